"""Average the weights of checkpoints of one training run.

    python average.py demo-47500.nemo demo-52300.nemo --out demo.nemo

README.md has the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import save
from nemo.collections.asr.models import ASRModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    models = [ASRModel.restore_from(str(path), map_location="cpu") for path in options.checkpoints]
    with torch.no_grad():
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            parameters[0].copy_(torch.stack(parameters).mean(dim=0))
    save(models[0], options.out)


if __name__ == "__main__":
    main()
