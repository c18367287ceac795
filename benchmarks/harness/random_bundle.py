"""A full-size bundle of random weights, written where it is needed: no NeMo, no PyTorch, nothing to copy there.

    python -m nemostream.benchmarks.harness.random_bundle OUT/

It has the published model's shape and the front end of the packaged one, so every graph and kernel does its full work;
what it says means nothing. (`synthetic` makes a whole NeMo checkpoint instead, to compare with NeMo.)
"""

from __future__ import annotations

import argparse
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nemostream
from nemostream.benchmarks.harness.synthetic import Sizes
from nemostream.bundle import Bundle, ChunkConfig, DecoderConfig, EncoderConfig
from nemostream.export.bundle import write_bundle
from nemostream.export.checkpoint import Checkpoint


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """Tensors by the names a real checkpoint has, each drawn from its own seed when it is asked for."""

    sizes: Sizes
    seed: int
    front: Bundle  # whose window and mel filters are used

    def array(self, name: str) -> NDArray[Any]:
        if name == "preprocessor.featurizer.window":
            inner = [self.front.weight("features.window_left"), self.front.weight("features.window_right")[::-1]]
            return np.concatenate([[0.0], *inner, [0.0]])
        if name == "preprocessor.featurizer.fb":
            return np.array(self.front.weight("features.filters").T[None])
        shape = self._shape(name)
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        array = rng.standard_normal(shape, np.float32)
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            return 0.1 * array + (1 if name.endswith("weight") else 0)
        if len(shape) == 1 or "pos_bias" in name:
            return 0.1 * array
        if name.endswith("embed.weight"):
            array[-1] = 0  # blank
            return array
        return array / np.sqrt(np.float32(np.prod(shape[1:])))

    def has(self, name: str) -> bool:
        return self.sizes.use_bias or not (name.endswith(".bias") and ".layers." in name and "norm" not in name)

    def _shape(self, name: str) -> tuple[int, ...]:
        s = self.sizes
        wide, hidden, channels = s.d_model, s.pred_hidden, s.conv_channels
        bins = s.mels
        for _ in range(s.subsampling.bit_length() - 1):
            bins = bins // 2 + 1
        known: dict[str, tuple[int, ...]] = {
            "pre_encode.conv.0.weight": (channels, 1, 3, 3),
            **{f"pre_encode.conv.{n}.weight": (channels, 1, 3, 3) for n in (2, 5)},
            **{f"pre_encode.conv.{n}.weight": (channels, channels, 1, 1) for n in (3, 6)},
            **{f"pre_encode.conv.{n}.bias": (channels,) for n in (0, 2, 3, 5, 6)},
            "pre_encode.out.weight": (wide, channels * bins),
            "pre_encode.out.bias": (wide,),
            **{f"feed_forward{n}.linear1.weight": (4 * wide, wide) for n in (1, 2)},
            **{f"feed_forward{n}.linear2.weight": (wide, 4 * wide) for n in (1, 2)},
            **{f"self_attn.linear_{part}.weight": (wide, wide) for part in ("q", "k", "v", "out", "pos")},
            **{f"self_attn.pos_bias_{letter}": (s.n_heads, wide // s.n_heads) for letter in "uv"},
            "conv.pointwise_conv1.weight": (2 * wide, wide, 1),
            "conv.depthwise_conv.weight": (wide, 1, s.conv_kernel),
            "conv.pointwise_conv2.weight": (wide, wide, 1),
            "joint.enc.weight": (s.joint_hidden, wide),
            "joint.pred.weight": (s.joint_hidden, hidden),
            "joint.joint_net.2.weight": (s.vocab + 1, s.joint_hidden),
            "joint.joint_net.2.bias": (s.vocab + 1,),
            "joint.enc.bias": (s.joint_hidden,),
            "joint.pred.bias": (s.joint_hidden,),
            "prediction.embed.weight": (s.vocab + 1, hidden),
            **{f"lstm.weight_{side}h_l{n}": (4 * hidden, hidden) for side in "ih" for n in range(s.pred_layers)},
            **{f"lstm.bias_{side}h_l{n}": (4 * hidden,) for side in "ih" for n in range(s.pred_layers)},
        }
        for end, shape in known.items():
            if name.endswith(f".{end}") or name == end:
                return shape
        if "norm" in name:
            return (wide,)
        raise KeyError(f"nobody knows the shape of {name}")


def random_bundle(out: str | Path, seed: int = 0, sizes: Sizes | None = None) -> Bundle:
    """Write the bundle into the folder `out`, replacing it. Needs disk for the weights once (2.4 GB), little memory."""
    out, sizes, front = Path(out), sizes or Sizes(), Bundle.open(nemostream.demo_bundle())
    frame = front.manifest.features.hop * sizes.subsampling
    rate = front.manifest.features.sample_rate
    chunks = [
        ChunkConfig(1000 * (right + 1) * frame // rate, right + 1, left, (right + 1) * frame)
        for left, right in sizes.contexts
    ]
    source = RandomCheckpoint(
        name="random",
        features=front.manifest.features,
        encoder=EncoderConfig(
            sizes.n_layers,
            sizes.d_model,
            sizes.n_heads,
            sizes.subsampling,
            max(chunk.left for chunk in chunks),
            sizes.conv_kernel - 1,
        ),
        decoder=DecoderConfig(sizes.pred_layers, sizes.pred_hidden, sizes.joint_hidden, sizes.vocab, 10, "relu"),
        chunks=tuple(sorted(chunks, key=lambda chunk: chunk.ms)),
        log_guard=float(front.weight("features.guard")[0]),
        conv_norm=sizes.conv_norm_type,
        input_scale=1.0,
        joint_output="joint.joint_net.2",
        tokenizer=front.path / front.manifest.tokenizer.file,
        state={},
        sizes=sizes,
        seed=seed,
        front=front,
    )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return write_bundle(source, out, {"source": f"random weights, seed {seed}"})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.harness.random_bundle", description=__doc__.split("\n")[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(random_bundle(options.out, options.seed).path)


if __name__ == "__main__":
    main()
