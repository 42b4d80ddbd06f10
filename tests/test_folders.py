"""A folder and its archive: the same bytes whenever and wherever it is made."""

import os

from common.folders import folder_archive, unpack


def make(folder, order=("b/two.md", "a/one.md", "a/left-out.txt")):
    for name in order:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"This is {name}.\n", encoding="utf8", newline="\n")
    return folder


def test_the_same_bytes_whatever_the_order_and_the_time(tmp_path):
    first, second = make(tmp_path / "first"), make(tmp_path / "second", ["a/one.md", "b/two.md"])
    os.utime(first / "a" / "one.md", (1, 1))
    assert folder_archive(first) == folder_archive(second)
    (second / "a" / "one.md").write_text("changed", encoding="utf8")
    assert folder_archive(first) != folder_archive(second)


def test_unpacked_it_is_the_same_again_and_takes_the_place_of_what_was_there(tmp_path):
    folder, archive = make(tmp_path / "plays"), tmp_path / "plays.tar"
    content = folder_archive(folder)
    archive.write_bytes(content)
    (folder / "a" / "one.md").write_text("damaged", encoding="utf8")
    assert unpack(archive, folder) == folder
    assert folder_archive(folder) == content
    assert not (folder / "a" / "left-out.txt").exists(), "only what the archive holds"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plays"]
