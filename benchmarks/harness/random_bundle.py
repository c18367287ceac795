"""Create a full-size bundle with random weights, without NeMo, PyTorch or a download.

    python -m nemostream.benchmarks.harness.random_bundle OUT/

The bundle has the shape of the published model and the front end of the packaged model, so that all graphs and kernels
do the same work as with real weights. Its transcripts are meaningless. `synthetic` creates a NeMo checkpoint instead,
for comparisons with NeMo.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nemostream
from nemostream.benchmarks.harness.synthetic import Sizes
from nemostream.bundle import Bundle, ChunkConfig, DecoderConfig, EncoderConfig, LanguageConfig
from nemostream.export.bundle import write_bundle
from nemostream.export.checkpoint import Checkpoint


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """A checkpoint with the tensor names of a real one; each tensor is drawn on access, seeded by its name."""

    sizes: Sizes
    seed: int
    front_end: Bundle  # source of the window and the mel filters

    def array(self, name: str) -> NDArray[Any]:
        if name == "preprocessor.featurizer.window":
            inner = [
                self.front_end.weight("features.window_left"),
                self.front_end.weight("features.window_right")[::-1],
            ]
            return np.concatenate([[0.0], *inner, [0.0]])
        if name == "preprocessor.featurizer.fb":
            return np.array(self.front_end.weight("features.filters").T[None])
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
        scale = np.sqrt(np.float32(np.prod(shape[1:])))
        if name == "prompt_kernel.0.weight":
            array[:, self.sizes.d_model :] *= scale  # of one-hot prompts, which are one summand each
        return array / scale

    @property
    def joint_output(self) -> str:
        return "joint.joint_net.2"

    def pieces(self) -> list[str]:
        return []  # the tokenizer is the packaged model's, which may have another size

    def _shape(self, name: str) -> tuple[int, ...]:
        s = self.sizes
        width, hidden, channels = s.d_model, s.pred_hidden, s.conv_channels
        bins = s.mels
        for _ in range(s.subsampling.bit_length() - 1):
            bins = bins // 2 + 1
        shapes: dict[str, tuple[int, ...]] = {  # by the end of the name
            "pre_encode.conv.0.weight": (channels, 1, 3, 3),
            **{f"pre_encode.conv.{n}.weight": (channels, 1, 3, 3) for n in (2, 5)},
            **{f"pre_encode.conv.{n}.weight": (channels, channels, 1, 1) for n in (3, 6)},
            **{f"pre_encode.conv.{n}.bias": (channels,) for n in (0, 2, 3, 5, 6)},
            "pre_encode.out.weight": (width, channels * bins),
            "pre_encode.out.bias": (width,),
            **{f"feed_forward{n}.linear1.weight": (4 * width, width) for n in (1, 2)},
            **{f"feed_forward{n}.linear2.weight": (width, 4 * width) for n in (1, 2)},
            **{f"self_attn.linear_{part}.weight": (width, width) for part in ("q", "k", "v", "out", "pos")},
            **{f"self_attn.pos_bias_{letter}": (s.n_heads, width // s.n_heads) for letter in "uv"},
            "conv.pointwise_conv1.weight": (2 * width, width, 1),
            "conv.depthwise_conv.weight": (width, 1, s.conv_kernel),
            "conv.pointwise_conv2.weight": (width, width, 1),
            "joint.enc.weight": (s.joint_hidden, width),
            "joint.pred.weight": (s.joint_hidden, hidden),
            "joint.joint_net.2.weight": (s.vocab + 1, s.joint_hidden),
            "joint.joint_net.2.bias": (s.vocab + 1,),
            "joint.enc.bias": (s.joint_hidden,),
            "joint.pred.bias": (s.joint_hidden,),
            "prompt_kernel.0.weight": (2 * width, width + self.languages.count),
            "prompt_kernel.0.bias": (2 * width,),
            "prompt_kernel.2.weight": (width, 2 * width),
            "prompt_kernel.2.bias": (width,),
            "prediction.embed.weight": (s.vocab + 1, hidden),
            **{f"lstm.weight_{side}h_l{n}": (4 * hidden, hidden) for side in "ih" for n in range(s.pred_layers)},
            **{f"lstm.bias_{side}h_l{n}": (4 * hidden,) for side in "ih" for n in range(s.pred_layers)},
        }
        for suffix, shape in shapes.items():
            if name.endswith(f".{suffix}") or name == suffix:
                return shape
        if "norm" in name:
            return (width,)
        raise KeyError(f"unknown tensor: {name}")


def random_bundle(
    out: str | Path, seed: int = 0, sizes: Sizes | None = None, languages: LanguageConfig | None = None
) -> Bundle:
    """Write a bundle with random weights into the folder `out`, replacing it, and return it.

    `languages` are those of a prompted model; by default the model has one language. Needs 2.4 GB of disk space for
    the default sizes, and little memory.
    """
    out, sizes, front_end = Path(out), sizes or Sizes(), Bundle.open(nemostream.demo_bundle())
    frame = front_end.manifest.features.hop * sizes.subsampling
    rate = front_end.manifest.features.sample_rate
    chunks = [
        ChunkConfig(1000 * (right + 1) * frame // rate, right + 1, left, (right + 1) * frame)
        for left, right in sizes.contexts
    ]
    checkpoint = RandomCheckpoint(
        name="random",
        features=front_end.manifest.features,
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
        log_guard=float(front_end.weight("features.guard")[0]),
        conv_norm=sizes.conv_norm_type,
        input_scale=1.0,
        use_bias=sizes.use_bias,
        tokenizer=front_end.path / front_end.manifest.tokenizer.file,
        state={},
        sizes=sizes,
        languages=languages or LanguageConfig(),
        seed=seed,
        front_end=front_end,
    )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.NamedTemporaryFile(suffix=".model") as tokenizer:
        tokenizer.write(_tokenizer(sizes.vocab))
        tokenizer.flush()
        checkpoint = replace(checkpoint, tokenizer=Path(tokenizer.name))
        return write_bundle(checkpoint, out, {"source": f"random weights, seed {seed}"})


def _tokenizer(vocabulary: int) -> bytes:
    """Return a SentencePiece model of `vocabulary` pieces, which are made-up words."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"word{index}" for index in range(vocabulary)),
        model_writer=model,
        model_type="word",
        vocab_size=vocabulary,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.harness.random_bundle", description=__doc__.split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder for the bundle; it is replaced")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    options = parser.parse_args(arguments)
    print(random_bundle(options.out, options.seed).path)


if __name__ == "__main__":
    main()
