"""The library that the notebooks build up to, and import.

One room per concept, in the order in which data flows through them. A room may import from the
rooms above it, never from those below.

    download        bring a file over the network: resumed, verified, put in place in one step
    folders         a folder as one archive, the same bytes on every machine
    assets          every file that is not code: where it comes from, its licence, its SHA-256
    classroom       what each laptop's doctor found, sent to the instructor, in one table
    mirror          `course fetch --serve`: one machine of a room offers its files to the others
    device          where tensors live: CUDA, MPS or CPU, chosen in one place
    allocator       freed memory kept at hand, for training on Linux
    pretokenizer    text cut into words, across which nothing is merged
    bpe_training    byte pairs: count, merge, repeat, without counting again
    tokenizer_file  tokenizers on disk: the course's own format, and GPT-2's
    tokenizer       words and byte pairs: train, encode, decode, save, load; GPT-2's tokenizer
    corpus          raw text: harvest, clean, deduplicate, split; streams, larger than memory
    audit           what a corpus holds: languages, personal data, group terms, leakage
    balance         who is in a corpus, and how often: mixing, counterfactuals
    shards          token ids on disk, written in parallel, opened without being loaded
    dataloader      sliding windows; random batches from shards, which resume
    layers          LayerNorm, RMSNorm, GELU MLP, SwiGLU, positions learned and rotary
    attention       from one attention weight to grouped queries with a KV cache
    transformer     the encoder-decoder of 2017
    gpt             one decoder that is GPT-2 or a modern LLM; parameters, FLOPs, memory
    generation      greedy, temperature, top-k, top-p; streaming; batched, cached
    decoding        a copy of a model that only writes: few large operations
    quantization    8-bit weights, for writing faster on any processor
    gguf_file       the GGUF format: read, checked, dequantised
    families        how the files of GPT-2 and of Llama name and shape what GPT has
    configurations  what they call its settings, inwards and outwards
    token_formats   tokenizers as model files carry them, inwards and outwards
    weight_files    safetensors, NumPy, PyTorch, GGUF: written one tensor at a time
    sources         what a file or folder of weights holds: recognised, checked
    weights         pretrained weights in, checkpoints out
    export          weights out, in five formats that other programs read
    model_card      what a stranger must know about a model
    hub             `course push`: a model to a model hub, after a look at what would go there
    losses          what a prediction costs; never all logits at once
    objectives      what is predicted: the next token, hidden ones, a rest, spans cut out
    distributed     one run on several processes: copies, or one sharded model
    schedule        the settings of a run, and its learning rate at every step
    evaluation      loss, perplexity, bits per byte; looking without disturbing
    history         what a run leaves to look at: steps, evaluations, samples
    divergence      when to stop: a loss that is no number, or has exploded
    checkpoint      a run on disk: stopped at any moment, it goes on exactly
    training        the loop: any model, any loss, accumulated, clipped, watched
    pretraining_data  texts to a held-out part, a tokenizer, token shards
    pretrain_options  what can be typed after the command, and the settings it makes
    pretrain        the command that ties them together, on one process or many
    fine_tuning     rows of like length together; which weights learn; the best look is kept
    pooled          a GPT read by a small head: one state per text, frozen blocks computed once
    lora            small matrices learn beside large ones, which stay as they are
    messages        texts with labels: read, made unlike each other, divided
    metrics         how good a classifier is: accuracy and its interval, ROC, calibration
    classifier      a GPT with a head that sorts texts; saved
    classifier_training  which weights learn, for how long, from which messages
    classification  the command that ties them together, and the baselines
    learning_curve  many runs of it, a line each in a table; means and their intervals
    chat_format     conversations as token ids: templates, control tokens, what is learned
    instruction_data  instructions with answers, pairs of answers: read, checked
    instruction     fine-tuning on answers alone; answering, streamed and in batches
    answers         how good answers are, by rules: matches, overlap, form, refusals
    judges          which of two answers is better: a local model or a server says
    rewards         which answer people would prefer, as one number: a reward model
    preference      DPO: the same pairs teach a model without a reward model
    rollout         a policy writes, and keeps the log-probability of every token it drew
    reinforcement   REINFORCE, GRPO, PPO: advantages, clipped ratios, leashes to a reference
    policy_training  the loop: write, judge, learn, and look how far the policy has strayed
    alignment_models  one base, adapters for each step of the way, answers in low precision
    alignment_records  results as JSON lines, and the figures that follow from them
    alignment_bench  data, records and models of one comparison
    alignment_supervised  stages that learn from examples: answers, and two reward models
    alignment_policies  stages that learn from preferences: DPO, and PPO against a reward model
    alignment_comparison  all models side by side, and a blind reading
    alignment       the command that runs the stages
    chat            `course chat`: a conversation in the terminal
    plotting        figures that more than one notebook draws
    checks          what `course doctor` asks: Python, packages, Jupyter, PyTorch
    doctor          can this machine run the course, and if not, what to do
    chapters        the notebooks: which there are, their sections, their exercises
    student         `course student`: blanks in the place of solutions, and nothing else broken
    clock           `course clock`: when each section begins, checkpoints, what to skip when late
    progress        `course check`: which exercises of a learner's own copy pass, with hints
    slides          `course slides`: reveal.js from the same cells, with speaker notes
    teaching        the `course` commands of a class: student, clock, check, slides
    cli             the `course` command
"""
