"""Similarity of published prompts: `python benchmarks/published_prompts_similarity.py --data FOLDER --out RESULT`.

FOLDER holds `google_t5_1_1_lm100k_base/*.npy` (prompts of Lester et al. 2021, from google-research/prompt-tuning on
GitHub) and `transferability/*.pt` (prompts of Su et al. 2022, from thunlp/Prompt-Transferability). Each group is of one
model, so its numbers can be compared. Beside them stand random vectors of the same lengths: what the measures say of
prompts that have nothing in common.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.storage.published import import_published
from softprompts.transfer.pictures import save_pictures
from softprompts.transfer.similarity import MEASURES

GROUPS = {
    "google_t5_1_1_lm100k_base": "T5 1.1 base, LM-adapted; Lester et al. 2021",
    "transferability": "T5 small; Su et al. 2022",
}
SEEDS = 20


def main() -> None:
    """Compare, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the published files")
    parser.add_argument("--out", type=Path, required=True, help="path of the result, without suffix")
    parser.add_argument("--pictures", type=Path, help="folder for heat maps and trees")
    options = parser.parse_args()
    lines = [
        "# Similarity of published prompts",
        "",
        f"`python benchmarks/published_prompts_similarity.py --data DIR --out RESULT`, {time.strftime('%Y-%m-%d')}, "
        f"{platform.machine()}. `itself`: a prompt with itself, mean over prompts. `random`: a prompt against random "
        f"vectors of its own lengths, mean ± standard deviation over {SEEDS} seeds and all prompts.",
        "",
    ]
    results = {}
    for folder, title in GROUPS.items():
        files = sorted(path for path in (options.data / folder).iterdir() if path.suffix in (".npy", ".pt"))
        prompts, labels = [import_published(path) for path in files], [path.stem for path in files]
        lengths = [prompt.table_PW.norm(dim=1).mean().item() for prompt in prompts]
        about = ", ".join(f"{label} {length:.0f}" for label, length in zip(labels, lengths, strict=True))
        lines += [f"## {title}", "", f"{tuple(prompts[0].table_PW.shape)} each; mean length of a vector: {about}.", ""]
        pairs = [(one, two) for one in range(len(files)) for two in range(one + 1, len(files))]
        names = [f"{labels[one]}, {labels[two]}" for one, two in pairs]
        lines += [
            "| measure | " + " | ".join(names) + " | itself | random |",
            "| --- |" + " --- |" * (len(names) + 2),
        ]
        for name in MEASURES:
            matrix = MEASURES.get(name).matrix(prompts)
            chance = against_random(name, prompts)
            cells = [f"{matrix[one, two]:.4g}" for one, two in pairs]
            cells += [f"{matrix.diagonal().mean():.4g}", f"{chance.mean():.2g} ± {chance.std():.2g}"]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
            results[f"{folder} {name}"] = {"labels": labels, "matrix": matrix.tolist(), "random": chance.tolist()}
            if options.pictures is not None:
                save_pictures(matrix, labels, f"{title}: {name}", options.pictures / f"{folder}_{name}")
        lines.append("")
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def against_random(measure: str, prompts: list[SoftPrompt]) -> Tensor:
    """Every prompt against random directions with the lengths of its own vectors, once per seed."""
    values = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        for prompt in prompts:
            table_PW = prompt.table_PW
            noise_PW = torch.randn(table_PW.shape, generator=generator)
            noise_PW = noise_PW / noise_PW.norm(dim=1, keepdim=True) * table_PW.norm(dim=1, keepdim=True)
            random = prompt_from_table("embedding", prompt.geometry, noise_PW)
            values.append(MEASURES.get(measure)(prompt, random))
    return torch.tensor(values)


if __name__ == "__main__":
    main()
