"""`make gpu`: what an NVIDIA GPU does with this tree, in under nine minutes, without network, Ray or an installation.

    prove.py [--device cuda] [--minutes 8.7] [--data FOLDER] [--out FOLDER] [--widths 0.5] [--without pace]
    prove.py --device cpu --steps 2        a dry run, on a few drawn photographs

    checks -> bench -> pace -> trainings for what is left of the minutes, one for each width

FOLDER of --data is what pack.py writes. Two calls, each with an --out of its own, so that no fault of the first costs
the training its time:

    prove.py --without train pace --minutes 3.7
    prove.py --without checks bench pace --minutes 6.3

A training begins anew, or with --init FILE, a checkpoint of the same width, and a lower --learning-rate. Each step runs
in a process of its own, with a limit, so that none that fails, hangs or dies stops the next. All that is known is
written at once: results.json, log.txt, and NAME.K.safetensors, the best weights so far in half precision (pack.py joins
them). At most eight files of 16 MB. It needs torch, numpy, OpenCV, Pillow, pyarrow and safetensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATH = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
sys.path[:0] = PATH


class _Unchecked:
    """What stands for jaxtyping's types where it is not installed: shapes are documentation outside pytest."""

    def __class_getitem__(cls, shape: Any) -> Any:
        return Any


def _type(name: str) -> type[_Unchecked]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Unchecked


STAND_IN = types.ModuleType("jaxtyping")
STAND_IN.__getattr__ = _type  # type: ignore[method-assign]
try:
    import jaxtyping  # noqa: F401
except ImportError:
    sys.modules["jaxtyping"] = STAND_IN

NAMES = {1.0: "whole", 0.5: "half"}
PART_BYTES = 15 * 10**6
RESERVE_S = 25.0
"""For the last weights to be written."""
LIMITS_S = {"checks": 110.0, "bench": 80.0, "pace": 45.0}
PATCHES, RATES = 32, {1.0: 7e-4, 0.5: 1.2e-3}
EPOCH_STEPS = 5000
"""More than an epoch by the clock has: no validation comes earlier than that asks for."""
IN_FLIGHT = (1, 4, 8, 16)
BATCHES = (32, 64, 16)


class Report:
    """results.json and log.txt of a folder, written whole after each change."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._log = folder / "results.json", folder / "log.txt"
        self.values: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """What another process has put."""
        self.values = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def put(self, *path: str, value: Any) -> None:
        """At a path of names."""
        *parents, last = path
        place = self.values
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
        scratch = self._file.with_name(f".{os.getpid()}")
        scratch.write_text(json.dumps(self.values, indent=1) + "\n")
        scratch.replace(self._file)

    def say(self, text: str) -> None:
        """A line on the terminal and in the log."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)  # noqa: T201
        with self._log.open("a") as log:
            log.write(line + "\n")


# Steps, each in a process of its own.


def checks(given: argparse.Namespace, report: Report) -> None:
    from checks import CHECKS

    for check in CHECKS:
        began = time.monotonic()
        outcome: dict[str, Any]
        try:
            outcome = {"status": "passed", **check(given.device)}
        except Exception as error:  # noqa: BLE001  whatever it is, the next check is to run
            outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
            outcome["where"] = traceback.format_exc(limit=-3)[-1500:]
        outcome["seconds"] = round(time.monotonic() - began, 2)
        report.put("checks", check.__name__, value=outcome)
        report.say(f"check {check.__name__}: {outcome['status']} {outcome.get('error', '')[:200]}")


def bench(given: argparse.Namespace, report: Report) -> None:
    from ma_cluster.images.sample import enlarged_sample
    from ma_cluster.report.bench import BENCHMARKS, SAMPLE_SIDE_PX, Subject, run_benchmarks

    model, side_px = ("lite", SAMPLE_SIDE_PX) if given.steps is None else (str(_tiny_model(given.scratch)), 500)
    image = given.scratch / "eye.jpg"
    image.write_bytes(enlarged_sample(side_px)[0])
    subject = Subject(model=model, image=image, device=given.device, threads=1, repeats=3 if given.steps is None else 1)
    names = ["detect"] if _is_missing("monai") else ["detect", "monai"]
    found = run_benchmarks(
        {name: BENCHMARKS[name] for name in names}, subject, lambda name, rows: report.put("bench", name, value=rows)
    )
    report.put("bench", "machine", value=found["machine"])
    _in_flight(given, report, model, image.read_bytes())


def _in_flight(given: argparse.Namespace, report: Report, model: str, data: bytes) -> None:
    """Photographs a second from files to files, several at a time, and the share of the time the GPU is busy."""
    from ma_cluster.lesions.detector import Detector
    from ma_cluster.report.detections import detect_files
    from ma_cluster.storage.store import open_store

    precisions = ("float32",) if given.device == "cpu" else ("float32", "bfloat16")
    images = [given.scratch / f"photograph_{number:02d}.jpg" for number in range(48)]
    for image in images:
        image.write_bytes(data)
    for precision in precisions:
        detector, seconds_of_networks = Detector.load(model, device=given.device, precision=precision), None
        list(detect_files(detector, images[:2], open_store(given.scratch / "warm"), "default", 1))
        for in_flight in IN_FLIGHT:
            some = images[: 2 if given.steps else max(4, 2 * in_flight)]
            began = time.perf_counter()
            with Busy() as busy:
                outcomes = list(
                    detect_files(detector, some, open_store(given.scratch / f"out{in_flight}"), "default", in_flight)
                )
            rate = len(some) / (time.perf_counter() - began)
            seconds = {stage: 0.0 for stage in ("hgn", "prn", "lesions")}
            for outcome in outcomes:
                seconds |= {
                    k: seconds.get(k, 0) + v / len(some) for k, v in getattr(outcome.result, "seconds", {}).items()
                }
            seconds_of_networks = seconds_of_networks or seconds["hgn"]
            row = {"photographs_per_second": rate, "seconds": seconds, "gpu_utilisation": busy.share}
            row["networks_alone_share"] = seconds_of_networks * rate
            report.put("bench", "in_flight", precision, str(in_flight), value=row)
            report.say(f"{precision}, {in_flight} in flight: {rate:.2f} photographs/s, GPU {busy.share}")


class Busy:
    """Share of half-second samples of nvidia-smi's utilisation; None where there is no nvidia-smi."""

    def __enter__(self) -> Busy:
        self._samples: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(10)

    @property
    def share(self) -> float | None:
        return sum(self._samples) / len(self._samples) / 100 if self._samples else None

    def _watch(self) -> None:
        while not self._done.wait(0.3):
            found = _ask("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
            if found is None:
                return
            self._samples.append(float(found.splitlines()[0]))


def pace(given: argparse.Namespace, report: Report) -> None:
    """Patches a second and memory of a training step, by width and mini-batch; what does not fit says so."""
    import torch

    from ma_cluster.config import lite
    from ma_cluster.hypotheses.frrn import build_hgn
    from ma_cluster.hypotheses.hgn_training import HgnBatch, hgn_losses
    from ma_cluster.networks import build_optimizer, descend

    on_gpu, side = given.device != "cpu", 256 if given.steps is None else 64
    torch.backends.cudnn.benchmark = True
    for width in given.widths:
        for batch in BATCHES if given.steps is None else BATCHES[:1]:
            config = replace(lite().hgn_half, width=width)
            try:
                model = build_hgn(config, 4).to(given.device, memory_format=torch.channels_last)
                optimizer = build_optimizer(model, config)
                pixels = torch.randint(0, 255, (batch, side, side, 3), dtype=torch.uint8, device=given.device)
                work = HgnBatch(pixels.permute(0, 3, 1, 2), torch.zeros(batch, 4, side, side, device=given.device) > 0)
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                for step in range(13 if on_gpu else 2):
                    if step == (3 if on_gpu else 1):
                        _wait(on_gpu)
                        began, first = time.perf_counter(), step
                    descend(model, optimizer, hgn_losses(model, work, config).total, 1e-4)
                _wait(on_gpu)
                rate = batch * (step + 1 - first) / (time.perf_counter() - began)
                row: Any = {"patches_per_second": rate}
                if on_gpu:
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            except RuntimeError as error:  # out of memory, most of all
                row = {"error": str(error)[:300]}
            report.put("pace", str(width), str(batch), value=row)
            report.say(f"pace, width {width}, {batch} patches: {row}")


def _wait(on_gpu: bool) -> None:
    import torch

    if on_gpu:
        torch.cuda.synchronize()


def train(given: argparse.Namespace, report: Report) -> None:
    from ma_cluster.config import lite
    from ma_cluster.training.run import TrainRequest
    from ma_cluster.training.start import train_local

    (width,) = given.widths
    recipe, where = lite(), {"data": str(given.data / "idrid"), "healthy": str(given.data / "grades.csv")}
    config = replace(
        recipe.hgn_half,
        width=width,
        batch_patches=given.batch,
        learning_rate=given.learning_rate or RATES.get(width, 1e-3),
        steps=10**6,
        warmup_steps=100,
        weight_average=0.999,
        hard_photographs=8,
    )
    if not (given.data / "idrid").is_dir():  # a dry run
        from fundus_set import rich_recipe, rich_set

        given.scratch.mkdir(parents=True, exist_ok=True)
        where, recipe = rich_set(given.scratch / given.name), rich_recipe()
        config = replace(config, patch_px=64, hard_probability=0.5)
    request = TrainRequest(
        network="hgn_half",
        out=str(given.scratch / f"run_{given.name}"),
        recipe=replace(recipe, hgn_half=config),
        steps=given.steps,
        epoch_steps=given.steps or EPOCH_STEPS,
        minutes=(given.ends_at - time.time()) / 60,
        seed=7,
        init=given.init,
        **where,
    )
    train_local(request, given.device, lambda progress: report.say(f"{given.name}: {progress}"))


STEPS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "checks": checks, "bench": bench, "pace": pace, "train": train,
}  # fmt: skip


# The whole, in this process.


def prove(given: argparse.Namespace, report: Report) -> None:
    began = time.time()
    ends_at = began + 60 * given.minutes - RESERVE_S
    report.put("machine", value=_machine(given.device))
    packed = (given.data / "idrid").is_dir()
    report.put(
        "data", value="photographs that were packed" if packed else "drawn: no pack was found, figures mean nothing"
    )
    report.say(f"trains on {report.values['data']}")
    for step in LIMITS_S:
        if step not in given.without:
            _run(given, report, step, min(LIMITS_S[step] * given.patience, ends_at - time.time()))
    for number, width in enumerate(given.widths):
        if "train" not in given.without:
            own = ends_at if given.steps else time.time() + (ends_at - time.time()) / (len(given.widths) - number)
            _train(given, report, width, own)
    report.put("seconds", value=round(time.time() - began, 1))


def _train(given: argparse.Namespace, report: Report, width: float, ends_at: float) -> None:
    """A network of a width; where the memory was too small, and nothing is kept yet, with half the mini-batch."""
    name, batch = NAMES.get(width, f"width{width:g}"), PATCHES if given.steps is None else 2
    while batch >= 1 and ends_at - time.time() > 20:
        run = f"{name}_{batch}"
        more = ["--widths", str(width), "--batch", str(batch), "--ends-at", str(ends_at), "--name", run]
        status = _run(given, report, "train", ends_at - time.time() + RESERVE_S / 2, more)
        if not status or any(given.out.glob(f"{name}.*.safetensors")) or "out of memory" not in _output(given).lower():
            return
        batch //= 2


def _run(given: argparse.Namespace, report: Report, step: str, limit_s: float, more: Sequence[str] = ()) -> int:
    """A step in a process of its own; its exit status, -1 where its time was up. Weights are kept as they come."""
    if limit_s <= 5:
        report.say(f"{step}: no time is left")
        return -1
    command = [sys.executable, __file__, "--step", step, "--device", given.device, "--out", str(given.out)]
    command += ["--scratch", str(given.scratch), "--data", str(given.data)]
    for name in ("steps", "init", "learning_rate"):
        value = getattr(given, name)
        command += [f"--{name.replace('_', '-')}", str(value)] if value else []
    command += more or ["--widths", *map(str, given.widths)]
    report.say(f"{step} {' '.join(more)}: at most {limit_s:.0f} s")
    began, kept, run = time.monotonic(), 0.0, more[-1] if more else ""
    with (given.scratch / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(), process_group=0)
        while process.poll() is None and time.monotonic() - began < limit_s:
            time.sleep(0.5)
            kept = _keep(given, report, run, kept) if run else kept
        late = process.poll() is None
        if late:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()
        status = -1 if late else process.wait()
    report.read()  # what the step has written
    if run:
        _keep(given, report, run, kept)
    report.put("steps", f"{step} {run}".strip(), value={"status": status, "seconds": time.monotonic() - began})
    if status:
        report.say(f"{step}: {'its time was up' if late else f'status {status}'}\n{_output(given)[-1500:]}")
    return status


def _output(given: argparse.Namespace) -> str:
    """What the last step has printed."""
    return (given.scratch / "output.txt").read_text(errors="replace")


def _keep(given: argparse.Namespace, report: Report, run: str, kept: float) -> float:
    """A run's best weights so far, in half precision and parts that may travel; when they were written."""
    name, best, log = (
        run.rpartition("_")[0],
        given.scratch / f"run_{run}/best.safetensors",
        given.scratch / f"run_{run}/log.json",
    )
    try:
        if log.is_file():
            _put_epochs(report, name, run, json.loads(log.read_text()))
        if not best.is_file() or best.stat().st_mtime <= kept:
            return kept
        written = best.stat().st_mtime
        _write_parts(best, given.out, name)
        report.say(f"{name}: weights kept")
        return written
    except Exception as error:  # noqa: BLE001  no room, or a file that is not whole: the training goes on
        report.say(f"{name}: weights not kept: {type(error).__name__}: {error}")
        return kept


def _put_epochs(report: Report, name: str, run: str, epochs: list[Any]) -> None:
    if report.values.get("training", {}).get(name, {}).get("epochs") != epochs:
        report.put("training", name, value={"run": run, "epochs": epochs})


def _write_parts(checkpoint: Path, out: Path, name: str) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    parts: list[dict[str, Any]] = [{}]
    room = PART_BYTES
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
        for key in sorted(file.keys()):
            if not key.startswith("model."):
                continue
            tensor = file.get_tensor(key)
            if tensor.ndim > 1:
                tensor = tensor.to(torch.float16)
            size = tensor.numel() * tensor.element_size()
            if size > room:
                parts.append({})
                room = PART_BYTES
            parts[-1][key], room = tensor, room - size
    for number, part in enumerate(parts, 1):
        place = out / f"{name}.{number}.safetensors"
        scratch = checkpoint.with_name("part")
        save_file(part, scratch, metadata)
        place.write_bytes(scratch.read_bytes())


def _environment() -> dict[str, str]:
    path = os.pathsep.join([*PATH, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version}
    try:
        import torch

        from ma_cluster import machine

        found |= machine.describe(device) | {"torch": torch.__version__, "cuda": torch.version.cuda}
    except Exception as error:  # noqa: BLE001  what is known of the machine decides nothing
        found["error"] = f"{type(error).__name__}: {error}"
    packages = ("jaxtyping", "simplejpeg", "monai", "ray", "boto3")
    found["missing"] = [*filter(_is_missing, packages)]
    found["nvidia_smi"] = _ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return found


def _is_missing(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] in (None, STAND_IN)
    return importlib.util.find_spec(name) is None


def _ask(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _tiny_model(scratch: Path) -> Path:
    from untrained import untrained_bundle

    from ma_cluster.bundle import save_bundle

    save_bundle(untrained_bundle(), scratch / "model")
    return scratch / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.7)
    parser.add_argument("--data", type=Path, default=Path("runs/gpu-data"))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"))
    parser.add_argument("--widths", type=float, nargs="+", default=[0.5])
    parser.add_argument("--without", choices=STEPS, nargs="*", default=["pace"], help="With no name: does all.")
    parser.add_argument("--steps", type=int, help="A dry run: so many steps of training, and all of it small.")
    parser.add_argument("--init", help="A checkpoint (.safetensors) that training begins with, of the same width.")
    parser.add_argument("--learning-rate", type=float, help="Peak rate; by default that of the width.")
    inner = parser.add_argument_group("of the processes of its steps")
    inner.add_argument("--step", choices=STEPS)
    inner.add_argument("--scratch", type=Path)
    inner.add_argument("--batch", type=int)
    inner.add_argument("--name")
    inner.add_argument("--ends-at", type=float)
    given = parser.parse_args()
    if given.step:
        STEPS[given.step](given, Report(given.out))
        return
    if given.steps is None and "train" not in given.without:
        needed = [given.data / "idrid", given.data / "grades.csv", *([Path(given.init)] if given.init else [])]
        if missing := [str(path) for path in needed if not path.exists()]:
            parser.error(f"no {', '.join(missing)} to train on: pack.py writes --data; --without train does without")
    for old in [*given.out.glob("*.safetensors"), given.out / "results.json", given.out / "log.txt"]:
        old.unlink(missing_ok=True)
    given.patience, given.minutes = (1, given.minutes) if given.steps is None else (10, 60.0)  # a busy CPU takes longer
    with tempfile.TemporaryDirectory(prefix="ma-gpu-") as scratch:
        given.scratch = Path(scratch)
        prove(given, Report(given.out))


if __name__ == "__main__":
    main()
