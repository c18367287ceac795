"""Mutation testing: change a module in small ways, one at a time, and report the changes that no test detects.

    make mutants MODULE=scheduler                 # compare with the baseline, tests/mutation/scheduler.json
    make mutants MODULE=scheduler ARGS=--record   # write the result into the baseline

mutmut generates the mutants and runs, for each, the tests that execute the changed function. Two kinds are added to its
operators: a removed statement and a negated condition. Of large modules a share of the mutants is selected by a digest
of the mutation, so that a change elsewhere in a file selects the same ones. They run in `build/mutants/MODULE`.

A module is a part of the package with its tests (`MODULES`). Its baseline contains the number of mutants, how many were
killed, those that survived, and those that are equivalent, with the reason: no test can detect them, or the code
runs at import, before mutmut selects a mutant. The command fails if a mutant survives that the baseline does not
list, or if less than 90 % are killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import libcst as cst

ROOT = Path(__file__).parents[2]
BASELINES = Path(__file__).parent
MIN_KILLED = 0.9
_NOT_RUN = 255  # exit code if pytest rejects the names of tests, which may differ when a process collects them again
_DECIDED = ("killed", "timeout", "segfault", "suspicious", "survived", "no tests")
_READ_BY_TESTS = ("examples", "docs", "benchmarks/results")
# Worker processes; each mutant runs in one.
WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Module:
    """What is mutated, the tests that should detect it, and the share of the mutants that is run."""

    sources: tuple[str, ...]  # below src/nemostream
    tests: tuple[str, ...]  # below tests
    share: float = 1.0
    makes_bundles: bool = False  # the bundles that tests share must not be made by a mutant


def _tests(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/test_{name}.py" for name in names.split())


def _sources(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}.py" for name in names.split())


STREAMING, TEXT, GPU = "runtime/streaming", "runtime/text", "runtime/backends/gpu"
# Files of tests that start servers, run whole benchmarks or decode long recordings are left out: a mutant would take
# minutes. So are files whose tests execute nearly every function.
MODULES = {
    "scheduler": Module(
        (STREAMING + "/scheduler.py", "step_loop.py"),
        (
            *_tests(STREAMING, "scheduler saved_state"),
            STREAMING + "/test_fork.py::test_no_call_of_the_scheduler_blocks_in_a_forked_child",
            "test_step_loop.py",
        ),
        0.12,
    ),
    "stream": Module(
        _sources(STREAMING, "session chunker state live aio offline"),
        (
            *_tests(STREAMING, "session offline aio chunker saved_state languages"),
            "runtime/test_model.py",
            TEXT + "/test_utterances.py",
        ),
        0.1,
    ),
    "snapshot": Module((STREAMING + "/snapshot.py",), _tests(STREAMING, "snapshot saved_state"), 0.2),
    "greedy": Module(("runtime/decoding/*.py",), _tests("runtime/decoding", "greedy confidence boosting"), 0.3),
    "endpointing": Module((TEXT + "/endpointing.py",), _tests(TEXT, "endpointing repetition"), 0.5),
    "text": Module(
        _sources(TEXT, "events words formats tokenizer languages scripts"),
        _tests(TEXT, "events words word_languages formats tokenizer scripts model_endpoint"),
        0.05,
    ),
    "audio": Module(
        ("runtime/audio/*.py",),
        (
            *_tests("runtime/audio", "headers parts files sources spool vad"),
            "runtime/audio/test_silence.py::test_skipped_samples_do_not_depend_on_the_pushes",
            "runtime/audio/test_containers.py::test_array_with_the_bytes_of_a_file_is_rejected",
            "runtime/audio/test_containers.py::test_without_pyav_the_error_names_the_extra",
        ),
        0.03,
    ),
    "command-line": Module(
        ("cli/*.py", "clips.py"),
        _tests("cli", "transcription options output exit_codes commands captions gpu_memory"),
        0.02,
    ),
    "cpu-backend": Module(_sources("runtime/backends", "base cpu cpus"), _tests("runtime/backends", "cpu cpus"), 0.1),
    "gpu-backend": Module(
        (GPU + "/*.py",),
        (
            *_tests(GPU, "ordering memory cuda encoders attention_plugin"),
            *(
                f"{GPU}/test_kernels.py::test_{name}"
                for name in (
                    "packed_weights_can_be_unpacked",
                    "rounding_to_16_bits",
                    "ranges_of_mel_filters",
                    "buckets_cover_every_batch",
                    "compiled_kernels_are_cached_by_everything_that_they_depend_on",
                    "sizes_at_the_limits",
                    "compiler_log_is_in_the_error",
                    "unsupported_sizes",
                )
            ),
            GPU + "/test_attention.py::test_as_many_rows_are_staged_as_fit",
            GPU + "/test_attention.py::test_unsupported_sizes",
        ),
        0.03,
    ),
    "exporter": Module(
        ("export/*.py",),
        (
            *_tests("export", "configuration checkpoint comparison graphs parity reference sentencepiece_model"),
            *_tests("export", "sources state_dict transformers_checkpoint"),
            "export/test_export.py::test_every_supported_variant_equals_nemo[batch norm, biases and xscaling]",
            "export/test_export.py::test_every_supported_variant_equals_nemo[other contexts, of different lengths]",
            "export/test_export.py::test_an_older_bundle_is_replaced",
            "export/test_families.py::test_multitalker_models_equal_nemo_for_one_speaker",
        ),
        0.015,
        makes_bundles=True,
    ),
    "precision": Module(
        _sources("engine", "precision fusion patterns weights calibration validate"),
        _tests("engine", "precision validation"),
        0.1,
    ),
    "plans": Module(
        ("plans.py", "bundle.py", "external_data.py", "untrusted.py"),
        ("test_plans.py", "test_bundle.py"),
        0.06,
        makes_bundles=True,
    ),
    "engines": Module(("engines.py",), ("test_choosing_engines.py",), 0.3),
    "service": Module(
        ("serving/service.py", "serving/session.py", "serving/errors.py", "serving/uploads/admission.py"),
        _tests("serving", "service session"),
        0.08,
    ),
    "protocols": Module(
        ("serving/protocols/*.py", "serving/uploads/upload.py"),
        _tests("serving/protocols", "websocket_messages realtime_messages riva_messages transcription_requests"),
        0.03,
    ),
    "network": Module(("serving/network/*.py",), _tests("serving/network", "access connections"), 0.05),
    "benchmarks": Module(  # the arithmetic
        (
            *_sources("benchmarks", "accuracy baseline capacity latency quick report serve throughput"),
            *_sources("benchmarks/harness", "load plots records roofline tables timed"),
            *_sources("benchmarks/gpu", "report roofline speed"),
            *_sources("benchmarks/studies", "boosting cost features transcripts"),
        ),
        (
            *_tests("benchmarks", "accuracy_figures baseline_times capacity commands latency quick report_figures"),
            *_tests("benchmarks", "report serve_clients throughput"),
            "benchmarks/test_accuracy.py::test_word_errors",
            "benchmarks/test_accuracy.py::test_errors_of_each_utterance_add_up",
            *_tests("benchmarks/harness", "load plots records roofline timed"),
            "benchmarks/gpu",
            *_tests("benchmarks/studies", "cost feature_costs features transcript_delays transcripts"),
        ),
        0.012,
    ),
}


def remove_statement(node: cst.BaseSmallStatement) -> Iterator[cst.BaseSmallStatement]:
    """Replace a call, an assignment or a `raise` by `pass`."""
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString | cst.Yield | cst.Ellipsis):
        return  # a docstring; without `yield` the function would not be a generator
    yield cst.Pass()


def negate_condition(node: cst.If) -> Iterator[cst.If]:
    """Replace `if a:` by `if not (a):`."""
    test = node.test.with_changes(lpar=[*node.test.lpar, cst.LeftParen()], rpar=[*node.test.rpar, cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def change_string(node: cst.BaseString) -> Iterator[cst.BaseString]:
    """Make one of mutmut's three changes of a string, and none of messages: three words or more."""
    from mutmut.mutation.mutators import operator_string

    if isinstance(node, cst.SimpleString) and len(node.value.split()) < 3:
        yield from list(operator_string(node))[:1]


def digest(*parts: object) -> float:
    """Return a number in [0, 1) that depends on the text of `parts` only."""
    data = "\n".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def configure(share: float) -> None:
    """Add the operators of this module to mutmut's, and select `share` of all mutations."""
    from mutmut.mutation import file_mutation, mutators

    operators: list[Any] = mutators.mutation_operators  # type: ignore[assignment]
    operators[:] = [
        (kind, change_string if operator is mutators.operator_string else operator) for kind, operator in operators
    ]
    operators += [
        (kind, remove_statement) for kind in (cst.Expr, cst.Assign, cst.AnnAssign, cst.AugAssign, cst.Raise, cst.Del)
    ]
    operators.append((cst.If, negate_condition))
    create = file_mutation.create_mutations

    def selected(*args: Any, **options: Any) -> Any:
        module, mutations, *rest = create(*args, **options)
        seen: Counter[tuple[str, str, str]] = Counter()
        kept = []
        for mutation in mutations:
            function = mutation.contained_by_top_level_function
            if not isinstance(function, cst.FunctionDef):
                continue
            key = (function.name.value, code(mutation.original_node), code(mutation.mutated_node))
            seen[key] += 1
            if digest(*key, seen[key]) < share:
                kept.append(mutation)
        return module, kept, *rest

    file_mutation.create_mutations = selected


def sort_tests() -> None:
    """Run the fastest tests of a mutant first: the first that fails ends its run."""
    from mutmut.state import state
    from mutmut.workers.isolation import ForkServerRunner

    submit = ForkServerRunner.submit

    def sorted_submit(runner: ForkServerRunner, mutant: str, tests: list[str], *limits: Any) -> None:
        submit(runner, mutant, sorted(tests, key=lambda test: state().duration_by_test[test]), *limits)

    ForkServerRunner.submit = sorted_submit  # type: ignore[method-assign, assignment]


def code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def stage(module: Module, folder: Path) -> None:
    """Copy the package (without symbolic links), the tests, what they read, and their configuration to `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "_host*")  # its methods would replace those in Python
    for name in ("src", "tests", *_READ_BY_TESTS):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "README.md", folder)
    sources = [f"src/nemostream/{path}" for path in module.sources]
    tests = [f"tests/{path}" for path in module.tests]
    # The exporter has NeMo as its oracle.
    marks = "not slow" if module.makes_bundles else "not slow and not nemo"
    settings = f"""
[tool.mutmut]
source_paths = ["src"]
also_copy = {json.dumps([*_READ_BY_TESTS, "README.md"])}
only_mutate = {json.dumps(sources)}
pytest_add_cli_args_test_selection = {json.dumps(tests)}
pytest_add_cli_args = ["-m", {json.dumps(marks)}, "-p", "no:cacheprovider"]
process_isolation = "forkserver"
use_git_change_detection = false
timeout_multiplier = 5.0
timeout_constant = 3.0
do_not_mutate_patterns = ['raise \\w+', 'log\\w*\\.\\w+\\(']
"""
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings)


def run(name: str, module: Module) -> list[dict[str, str]]:
    """Run all mutants of a module. Returns each with its function, the changed lines and its status."""
    folder = ROOT / "build" / "mutants" / name
    stage(module, folder)
    if not module.makes_bundles:
        os.environ["NEMOSTREAM_TEST_CACHE"] = str(ROOT / "build" / "test-cache")
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder / "mutants" / "src"),  # of processes that tests start
    }
    os.chdir(folder)
    if module.makes_bundles:
        import_module("nemo.collections.asr.models")  # here, because it takes 10 s in the process of each mutant
    configure(module.share)
    sort_tests()
    from mutmut import __main__ as mutmut

    with progress(folder / "progress"):
        mutmut._run((), WORKERS)
    return list(results())


@contextmanager
def progress(log: Path) -> Iterator[None]:
    """Write mutmut's progress to `log` unless standard output is a terminal."""
    if sys.stdout.isatty():
        yield
        return
    sys.stdout.flush()
    terminal = os.dup(1)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            os.write(terminal, log.read_bytes()[-5000:].replace(b"\r", b"\n"))
            raise
        finally:
            sys.stdout.flush()
            os.dup2(terminal, 1)
            os.close(terminal)


def results() -> Iterator[dict[str, str]]:
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code
    from mutmut.utils.file_utils import walk_mutatable_files
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        for key, exit_code in data.exit_code_by_key.items():
            function, owner = orig_function_and_class_names_from_key(key)
            lines = get_diff_for_mutant(key, path=path).splitlines()[2:]
            yield {
                "status": "not run" if exit_code == _NOT_RUN else status_by_exit_code[exit_code],
                "file": str(path).removeprefix("src/nemostream/"),
                "function": f"{owner}.{function}" if owner else function,
                "was": changed(lines, "-"),
                "became": changed(lines, "+"),
            }


def changed(diff: Iterable[str], sign: str) -> str:
    return "\n".join(line[1:].strip() for line in diff if line.startswith(sign))


def identity(mutant: dict[str, str]) -> tuple[str, ...]:
    return tuple(mutant[key] for key in ("file", "function", "was", "became"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", choices=sorted(MODULES))
    parser.add_argument("--share", type=float, help="run this share of all mutants instead of the module's")
    parser.add_argument("--record", action="store_true", help="write the result into the baseline")
    options = parser.parse_args()
    module = MODULES[options.module]
    if options.share:
        module = replace(module, share=options.share)
    found = run(options.module, module)
    if not found:
        sys.exit("no mutant was generated; increase --share.")
    if missing := sum(mutant["status"] not in _DECIDED for mutant in found):
        sys.exit(f"the run is not complete: {missing} mutants of {len(found)} have no result.")
    path = BASELINES / f"{options.module}.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"survived": [], "equivalent": []}
    equivalent = {identity(mutant): mutant for mutant in before["equivalent"]}
    undetected = [mutant for mutant in found if mutant["status"] in ("survived", "no tests")]
    survived = [mutant for mutant in undetected if identity(mutant) not in equivalent]
    listed = Counter(map(identity, before["survived"]))
    new = Counter(map(identity, survived)) - listed
    for mutant in survived:
        note = "  (not in the baseline)" if identity(mutant) in new else ""
        print(f"\n{mutant['file']}: {mutant['function']}: {mutant['status']}{note}")
        print("\n".join(f"-   {line}" for line in mutant["was"].split("\n")))
        print("\n".join(f"+   {line}" for line in mutant["became"].split("\n")))
    mutants = len(found) - (len(undetected) - len(survived))
    killed = mutants - len(survived)
    share = f", {module.share:.0%} of all" if module.share < 1 else ""
    print(f"\n{options.module}: {killed} of {mutants} mutants killed ({killed / max(mutants, 1):.1%}){share}")
    if options.record:
        keep = {identity(mutant) for mutant in undetected}
        baseline = {
            "share": module.share,
            "mutants": mutants,
            "killed": killed,
            "equivalent": [mutant for key, mutant in equivalent.items() if key in keep],
            "survived": [{key: mutant[key] for key in ("file", "function", "was", "became")} for mutant in survived],
        }
        path.write_text(json.dumps(baseline, indent=1, ensure_ascii=False) + "\n")
        return 0
    return int(killed < MIN_KILLED * mutants or bool(new))


if __name__ == "__main__":
    sys.exit(main())
