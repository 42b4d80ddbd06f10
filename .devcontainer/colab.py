# The first cell on Colab, Kaggle or any hosted Jupyter: paste all of it, put the address of this
# repository between the quotes, run it once. It installs into the Python that runs the notebook,
# and keeps the PyTorch that is there, with the driver of that machine's GPU, if it is 2.6 or newer.
import os
import subprocess
import sys

REPOSITORY = ""

if not os.path.isdir("common"):
    if not os.path.isdir("course"):
        assert REPOSITORY, "put the address of the repository between the quotes"
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "course"], check=True)
    os.chdir("course")
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "uv"], check=True)
uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
subprocess.run([*uv, "--editable", ".", "--group", "offline"], check=True)
sys.path.insert(0, os.getcwd())  # this kernel started before the course was installed
