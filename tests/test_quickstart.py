"""`examples/quickstart.ipynb` runs, shows the results of the API, and contains the outputs that it has when it runs.

`python tests/test_quickstart.py` runs the notebook and writes its outputs into it.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import nemostream

nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
image = pytest.importorskip("matplotlib.image", reason="needs the bench extra")
pytest.importorskip("ipykernel", reason="needs ipykernel")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
MAX_BYTES = 60_000
COLOURS = 48  # of a plot in the file
MILLISECONDS = re.compile(r"\d+\.\d ms")


def execute(folder: Path) -> Any:
    """Return the notebook with the outputs of a run in `folder`. Raises an error of its code."""
    notebook = nbformat.read(NOTEBOOK, 4)
    metadata = notebook.metadata.copy()
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources=resources, record_timing=False, coalesce_streams=True
    )
    client.execute()
    notebook.metadata = metadata
    return notebook


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
            patch.setenv(name, str(folder / name))
        return execute(folder)


def text(notebook: Any, cell: str) -> str:
    """Return what a cell printed."""
    (found,) = [one for one in notebook.cells if one.id == cell]
    assert all(output.name == "stdout" for output in found.outputs if output.output_type == "stream")
    return "".join(output.text for output in found.outputs if output.output_type == "stream")


def plots(notebook: Any) -> list[Any]:
    """Return the plots as arrays [height, width, colour]."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [image.imread(io.BytesIO(base64.b64decode(png))) for png in found]


def test_the_notebook_shows_the_results_of_the_api(run: Any) -> None:
    samples, rate = soundfile.read(nemostream.demo_clip(), dtype="int16")
    with nemostream.load() as model:
        result = model.transcribe(samples, sample_rate=rate)
        assert text(run, "transcribe") == f"{result.text}\n"
        rows = [line.split() for line in text(run, "words").splitlines()]
        assert [(row[0], row[2], row[4], row[5]) for row in rows] == [
            (f"{word.start:.2f}", f"{word.end:.2f}", f"{word.confidence:.2f}", word.text) for word in result.words
        ]
        *partials, final = text(run, "stream").splitlines()
        assert final.removeprefix("final").strip() == result.text
        texts = [line.partition(" s ")[2].strip() for line in partials]
        with model.stream(sample_rate=rate, chunk_ms=560) as stream:
            assert texts == [partial.text for partial in stream.push(samples)]
        twice = np.concatenate([samples, np.zeros(2 * rate, np.int16), samples])
        finals = [event for event in model.listen(twice, sample_rate=rate) if event.kind == "final"]
        lines = text(run, "listen").splitlines()
        assert [line.partition(" s ")[2].strip() for line in lines] == [event.text for event in finals]
        assert [float(line.split()[0]) for line in lines] == pytest.approx([e.start for e in finals], abs=0.006)
    sizes = [int(size) for size in re.findall(r"^chunks of +(\d+) ms", text(run, "latency"), re.MULTILINE)]
    assert sizes == [chunk.ms for chunk in model.manifest.chunks]


def test_the_outputs_in_the_file_are_those_of_a_run(run: Any) -> None:
    saved = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(saved)
    for before, after in zip(saved.cells, run.cells, strict=True):
        if before.cell_type == "code":
            assert before.execution_count == after.execution_count
            found = [MILLISECONDS.sub("... ms", text(notebook, before.id)) for notebook in (saved, run)]
            assert found[0] == found[1]
            kinds = [[output.output_type for output in cell.outputs] for cell in (before, after)]
            assert kinds[0] == kinds[1]
    assert len(plots(saved)) == len(plots(run)) == 2
    for old, new in zip(plots(saved), plots(run), strict=True):
        assert old.shape[:2] == new.shape[:2]
        assert all(0.01 < (picture[..., :3].min(2) < 0.9).mean() < 0.3 for picture in (old, new)), "ink on white"
    assert NOTEBOOK.stat().st_size <= MAX_BYTES


def test_links_of_the_notebook_exist() -> None:
    cells = nbformat.read(NOTEBOOK, 4).cells
    links = [link for cell in cells if cell.cell_type == "markdown" for link in re.findall(r"\]\((.*?)\)", cell.source)]
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def main() -> None:
    """Run the notebook and write it with its outputs; plots have few colours, so that the file is small."""
    from PIL import Image

    notebook = execute(NOTEBOOK.parent)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            small = io.BytesIO()
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
