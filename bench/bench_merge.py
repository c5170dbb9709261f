"""Claim: a weighted sum of two 750 MB bf16 files is ≥ 8 × as fast as mergekit's, in < 400 MB, and float32 rounded once.

    python bench/bench_merge.py [ROUNDS] [MEGABYTES]

Both are whole processes, run by turns; times are medians, memory the most that any ever held. mergekit is installed in
an environment of its own, merges the same two files in bfloat16 and writes neither a tokenizer nor a model card. What
torchparams writes is on the disk when it ends (fsync); what mergekit writes is in the cache of the system. The two
results, and float32 arithmetic of torch rounded once, are held against each other, element by element.

The other rows are other ways to merge the same two files, or what the second has added to the first.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common import DATA, HIDDEN, VOCABULARY, WIDTH, llama_file, machine, paired, peer, print_pairs, process, torchparams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WEIGHTS = (0.7, 0.3)
METHODS = {
    "slerp": ("-m", "slerp", "-w", "0.3"),
    "task_arithmetic": ("-m", "task_arithmetic"),
    "ties": ("-m", "ties", "-d", "0.2"),
    "dare": ("-m", "dare", "-d", "0.2"),
    "dare_ties": ("-m", "dare_ties", "-d", "0.2"),
}


def mergekit() -> str:
    """The command of mergekit."""
    return peer("MERGEKIT", "mergekit-yaml", "mergekit==0.1.5")


def as_model(path: Path, folder: Path) -> Path:
    """A directory that transformers takes for a model, with the file in it."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    layers = {found[1] for name in header if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compare(ours: Path, theirs: Path, sources: Sequence[Path]) -> tuple[int, int, int]:
    """Elements, how many of ours differ from float32 arithmetic rounded once, and how many of theirs do."""
    import torch
    from safetensors import safe_open

    total = wrong = other = 0
    files = [safe_open(path, "pt") for path in (ours, theirs, *sources)]
    for name in list(files[0].keys()):  # type: ignore[no-untyped-call]  # it has no types
        made, peer, a, b = (file.get_tensor(name) for file in files)  # type: ignore[no-untyped-call]  # as above
        exact = (a.float() * WEIGHTS[0] + b.float() * WEIGHTS[1]).bfloat16()
        total += exact.numel()
        wrong += int(torch.count_nonzero(made != exact))
        other += int(torch.count_nonzero(peer != exact))
    return total, wrong, other


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 750
    command = mergekit()
    sources = [llama_file(megabytes=size, seed=seed) for seed in (0, 1)]
    with tempfile.TemporaryDirectory(dir=DATA) as folder:
        here = Path(folder)
        out, peer = here / "out.safetensors", here / "peer"
        recipe = here / "recipe.yaml"
        models = [
            {"model": str(as_model(source, here / f"model{i}")), "parameters": {"weight": WEIGHTS[i]}}
            for i, source in enumerate(sources)
        ]
        recipe.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))  # YAML, too

        def fresh(argv: Sequence[str | Path], made: Path) -> Callable[[], tuple[float, int]]:
            def run() -> tuple[float, int]:
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
                process(["sync"])  # nobody pays for what the one before has left to be written
                return process(argv, env={"HF_HUB_OFFLINE": "1"})

            return run

        others = {}
        for name, options in METHODS.items():
            target = here / f"{name}.safetensors"
            given = sources if name == "slerp" else [sources[1]]
            base = () if name == "slerp" else ("--base", sources[0])
            others[name] = fresh(torchparams("merge", *given, target, *base, *options), target)
        results = paired(
            {
                "torchparams merge": fresh(torchparams("merge", *sources, out, "-w", "0.7,0.3"), out),
                "mergekit-yaml": fresh(
                    [command, recipe, peer, "--no-copy-tokenizer", "--no-write-model-card", "--quiet"], peer
                ),
                **others,
            },
            rounds,
        )
        total, wrong, other = compare(out, peer / "model.safetensors", sources)
    print(f"2 × {sources[0].stat().st_size / 1e6:.0f} MB, {rounds} rounds, {machine()}")
    print_pairs(results, "mergekit-yaml")
    print(f"{results['mergekit-yaml'][0] / results['torchparams merge'][0]:.1f} times as fast as mergekit")
    print(f"of {total:,} elements {wrong:,} differ from float32 arithmetic rounded once; of mergekit's, {other:,}")


if __name__ == "__main__":
    main()
