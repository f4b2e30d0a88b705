"""The commands for several steps, classes and concepts."""

from pathlib import Path
from typing import Annotated

import typer

from slsgu_cli import options as opt
from slsgu_cli.app import app
from slsgu_cli.records import Precision, Steer
from slsgu_cli.session import Session, command


@command(app, "trajectory")
def trajectory(
    session: Session,
    name: opt.Name,
    layer: opt.Layers = None,
    points: Annotated[int, typer.Option("--points", min=2, help="Steps a layer.")] = 20,
    until: Annotated[
        float | None,
        typer.Option(
            "--until",
            metavar="PERCENT",
            help="Move a layer this far, in % of its norm. Default: until it forgets.",
        ),
    ] = None,
    direction: opt.DirectionOption = None,
    ridge: opt.Ridges = None,
    steer: opt.SteerOption = Steer.FA1,
    margin: opt.Margin = None,
    precision: opt.PrecisionOption = Precision.FP32,
    device: opt.Device = "auto",
    cache_budget: opt.CacheBudget = None,
) -> None:
    """Follow accuracies over a fine grid of steps, layer by layer.

    Example: slsgu trajectory facebook --points 40
    """
    from slsgu_cli.cases import SearchOptions
    from slsgu_cli.errors import UsageError
    from slsgu_cli.several import show
    from slsgu_cli.several.trajectory import TrajectoryOptions, trajectory_and_plots

    if until is not None and not 0 < until < float("inf"):
        raise UsageError(f"--until {until} is no share of a norm", hint="such as --until 50")
    found, plots = trajectory_and_plots(
        session.store,
        name,
        options=TrajectoryOptions(
            search=SearchOptions(
                layers=layer or (),
                direction=direction,
                ridges=ridge or (),
                steer=steer,
                **opt.given(margin=margin),
                precision=precision,
                device=device,
                cache_budget=opt.size(cache_budget),
            ),
            points=points,
            until=None if until is None else until / 100,
        ),
    )
    show.trajectory(session.console, session.store, found, plots)


@command(app, "sweep")
def sweep(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the sweep.")],
    classes: Annotated[
        Path, typer.Option("--classes", help="File of classes to forget, one a line.")
    ],
    source: opt.Sources,
    model: opt.Model = None,
    pretrained: opt.Pretrained = None,
    not_match: opt.NotMatch = None,
    max_forget: opt.MaxForget = None,
    retain_source: opt.RetainSources = None,
    retain_samples: opt.RetainSamples = 8000,
    retain_exclude: opt.RetainExclude = None,
    evaluation: opt.Evals = None,
    eval_classes: Annotated[
        list[str] | None,
        typer.Option("--eval-classes", help="NAME=FILE or NAME=imagenet: class names. Repeatable."),
    ] = None,
    templates: opt.Templates = None,
    image_column: opt.ImageColumn = None,
    caption_column: opt.CaptionColumn = None,
    label_column: opt.LabelColumn = None,
    seed: opt.Seed = 0,
    batch_size: opt.BatchSize = 16,
    memory_budget: opt.MemoryBudget = None,
    direction: opt.DirectionOption = None,
    ridge: opt.Ridge = None,
    steer: opt.SteerOption = Steer.FA1,
    margin: opt.Margin = None,
    steps: opt.Steps = 10,
    precision: opt.PrecisionOption = Precision.FP32,
    device: opt.Device = "auto",
    cache_budget: opt.CacheBudget = None,
) -> None:
    """Forget each class of a list, one at a time.

    Runs build-sets, grad, rank and search for each class, under the class's name. All are
    kept out of the retain set and share its gradient. `{}` in a --source stands for the class.

    Example: slsgu sweep objects --classes seven.txt -m local-dir:clip -s icons.parquet --eval ...
    """
    from slsgu_cli.build import BuildRequest
    from slsgu_cli.cases import SearchOptions
    from slsgu_cli.errors import UsageError
    from slsgu_cli.evalsets import read_classes
    from slsgu_cli.ranking import RankOptions
    from slsgu_cli.records import PassOptions
    from slsgu_cli.several import show
    from slsgu_cli.several.sweep import SweepRequest, require_all_forgotten
    from slsgu_cli.several.sweep import sweep as run

    spec, listed = opt.model_spec(model, pretrained), read_classes(str(classes))
    if spec is None:
        raise UsageError("sweep needs the model to sweep over", hint="--model MODEL")
    request = SweepRequest(
        name=name,
        classes=listed.names if listed else (),
        build=BuildRequest(
            name="",
            concept="",
            model=spec,
            sources=source,
            not_match=not_match or (),
            max_forget=max_forget,
            retain_sources=retain_source or (),
            retain_samples=retain_samples,
            retain_exclude=retain_exclude or (),
            evals=opt.pairs("--eval", evaluation),
            classes=opt.pairs("--eval-classes", eval_classes),
            templates=opt.pairs("--templates", templates),
            image_column=image_column,
            caption_column=caption_column,
            label_column=label_column,
            seed=seed,
        ),
        gradients=PassOptions(
            batch_size=batch_size,
            precision=precision,
            device=device,
            memory_budget=opt.size(memory_budget),
        ),
        ranking=RankOptions(**opt.along(direction, ridge), device=device),
        search=SearchOptions(
            steer=steer,
            **opt.given(margin=margin),
            steps=steps,
            precision=precision,
            device=device,
            cache_budget=opt.size(cache_budget),
        ),
    )
    result = run(session.store, request)
    show.sweep(session.console, session.store, result)
    require_all_forgotten(result)
