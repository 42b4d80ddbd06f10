"""The library that the notebooks build up to, and import.

One room per concept, in the order in which data flows through them. A room may import from the
rooms above it, never from those below.

    assets       every file that is not code: where it comes from, its licence, its SHA-256
    device       where tensors live: CUDA, MPS or CPU, chosen in one place
    tokenizer    words and byte pairs: train, encode, decode, save, load; GPT-2's tokenizer
    corpus       raw text: harvest, clean, deduplicate, audit for bias and leakage, split
    dataloader   sliding windows, memory-mapped token shards, batches that resume
    plotting     figures that more than one notebook draws
    doctor       can this machine run the course, and if not, what to do
    cli          the `course` command
"""
