"""The command line: each command parses, calls one function and prints what it returns.

Nothing heavy is imported here: every command imports what it needs when it runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from slsgu_cli.cli import options as opt
from slsgu_cli.cli.app import Session, app, command
from slsgu_cli.records.method import Alignment, Precision, Steer
from slsgu_cli.records.sets import Distributor


@command(app, "build-sets")
def build_sets(
    session: Session,
    name: opt.MaybeName = None,
    source: opt.SomeSources = None,
    model: opt.Model = None,
    pretrained: opt.Pretrained = None,
    concept: Annotated[
        str | None, typer.Option("--concept", help="What to forget. Default: NAME.")
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option("--match", help="Captions to forget hold these words. Default: the concept."),
    ] = None,
    not_match: opt.NotMatch = None,
    regex: Annotated[
        bool, typer.Option("--regex", help="Patterns are regular expressions.")
    ] = False,
    max_forget: opt.MaxForget = None,
    retain_source: opt.RetainSources = None,
    retain_samples: opt.RetainSamples = 8000,
    retain_exclude: opt.RetainExclude = None,
    evaluation: opt.Evals = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--classes", help="NAME=FILE or NAME=imagenet: class names. Repeatable."),
    ] = None,
    templates: opt.Templates = None,
    forget_eval: opt.ForgetEval = None,
    image_column: opt.ImageColumn = None,
    caption_column: opt.CaptionColumn = None,
    label_column: opt.LabelColumn = None,
    seed: opt.Seed = 0,
    generate: opt.GeneratePrompts = None,
    pipeline: opt.Pipeline = None,
    count: opt.Count = 500,
    denoise: opt.Denoise = 25,
    guidance: opt.Guidance = None,
    device: opt.Device = "auto",
    names: opt.NamesFile = None,
    metadata: opt.Metadata = None,
    url_col: opt.UrlColumn = "URL",
    distributor: opt.DistributorOption = Distributor.MULTIPROCESSING,
    processes: opt.Processes = None,
    timeout: opt.Timeout = 10,
    retries: opt.Retries = 1,
    img2dataset: opt.Img2dataset = None,
    min_similarity: opt.MinSimilarity = None,
    near_duplicates: opt.NearDuplicates = None,
    replay: opt.Replay = False,
) -> None:
    """Curate a forget set, a retain set and evaluation sets.

    Example: slsgu build-sets facebook -m local-dir:clip -s 'laion/*.tar' --eval brands=test.parquet
    """
    from slsgu_cli.cli import sets, tables
    from slsgu_cli.errors import UsageError
    from slsgu_cli.records.sets import DownloadOptions, Screening
    from slsgu_cli.sets import build
    from slsgu_cli.sets import request as request_module
    from slsgu_cli.sets.request import BuildRequest
    from slsgu_cli.sources.captions import read_names

    if replay:
        from slsgu_cli.sets.build import replay as build_again

        again = request_module.check_replay(
            name, [source, model, metadata, names, match, evaluation]
        )
        sets.show_replayed(session.console, build_again(session.store, again))
        return
    if (name is None) == (names is None):
        raise UsageError("build-sets needs either NAME or --names FILE")
    concepts = read_names(names) if names else []
    spec = opt.model_spec(model, pretrained)
    if spec is None:
        raise UsageError("build-sets needs the model the sets are for", hint="--model MODEL")
    request = BuildRequest(
        name=name or concepts[0].name,
        concept=concept or name or concepts[0].name,
        model=spec,
        sources=source or (),
        match=match or (),
        not_match=not_match or (),
        regex=regex,
        max_forget=max_forget,
        retain_sources=retain_source or (),
        retain_samples=retain_samples,
        retain_exclude=retain_exclude or (),
        evals=opt.pairs("--eval", evaluation),
        classes=opt.pairs("--classes", classes),
        templates=opt.pairs("--templates", templates),
        forget_eval=forget_eval,
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        seed=seed,
        screening=Screening(min_similarity=min_similarity, near_duplicates=near_duplicates),
    )
    if generate:
        from slsgu_cli.downstream.image_sets import SourceRequest, forgetting_generated
        from slsgu_cli.records.targets import PaintOptions

        if pipeline is None:
            raise UsageError("--generate needs a pipeline", hint="--pipeline FOLDER")
        images = SourceRequest(
            prompts=generate,
            pipeline=pipeline,
            count=count,
            seed=seed,
            paint=PaintOptions(steps=denoise, guidance=guidance),
            device=device,
        )
        request = forgetting_generated(session.store, request, images)
    request = request_module.with_collection(
        request,
        concepts,
        metadata=metadata or (),
        url_column=url_col,
        download=DownloadOptions(
            distributor=distributor,
            processes=processes,
            timeout=timeout,
            retries=retries,
            command=img2dataset,
        ),
    )
    store, console = session.store, session.console
    if not concepts:
        tables.manifest(console, build.build(store, request))
        return
    built, failed = build.build_many(store, request, concepts)
    sets.show_manifests(console, built)
    build.require_all(failed)


@command(app, "grad")
def grad(
    session: Session,
    name: opt.Name,
    model: opt.Model = None,
    pretrained: opt.Pretrained = None,
    batch_size: opt.BatchSize = 16,
    precision: opt.PrecisionOption = Precision.FP32,
    device: opt.Device = "auto",
    memory_budget: opt.MemoryBudget = None,
    squares: Annotated[
        bool, typer.Option("--squares", help="Mean squared mini-batch gradients as well (slower).")
    ] = False,
) -> None:
    """Compute the forget and retain gradients of a set, once.

    Example: slsgu grad facebook
    """
    from slsgu_cli.cli import tables
    from slsgu_cli.method.gradients import compute_gradients
    from slsgu_cli.records.method import PassOptions

    result = compute_gradients(
        session.store,
        name,
        model=opt.model_spec(model, pretrained),
        options=PassOptions(
            batch_size=batch_size,
            precision=precision,
            device=device,
            memory_budget=opt.size(memory_budget),
        ),
        squares=squares,
    )
    tables.gradients(session.console, result)


@command(app, "rank")
def rank(
    session: Session,
    name: opt.Name,
    alignment: opt.AlignmentOption = Alignment.ABS,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    tower: opt.TowerOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Leave out what cannot influence this model: path, sd1, sd2, sdxl, llava, clip.",
        ),
    ] = None,
    encoder: opt.Encoder = None,
    direction: opt.DirectionOption = None,
    ridge: opt.Ridge = None,
    qkv: opt.QkvOption = None,
    device: opt.Device = "auto",
) -> None:
    """Score layers by importance and alignment; mark Pareto fronts.

    Example: slsgu rank facebook --tower vision --json
    """
    from slsgu_cli.cli import tables
    from slsgu_cli.method.edit import rank_and_plot
    from slsgu_cli.method.ranking import RankOptions

    ranking, plots = rank_and_plot(
        session.store,
        name,
        options=RankOptions(
            alignment=alignment,
            include=include or (),
            exclude=exclude or (),
            tower=tower,
            target=target,
            encoder=encoder,
            device=device,
            **opt.along(direction, ridge),
            **opt.given(qkv=qkv),
        ),
    )
    tables.ranking(session.console, ranking, plots)


@command(app, "search")
def search(
    session: Session,
    names: opt.Names,
    joint: Annotated[
        bool, typer.Option("--joint", help="Search edits that forget all of them together.")
    ] = False,
    direction: opt.DirectionOption = None,
    ridge: opt.Ridge = None,
    qkv: opt.QkvOption = None,
    steer: opt.SteerOption = Steer.FA1,
    margin: opt.Margin = None,
    steps: opt.Steps = 10,
    layer: opt.Layers = None,
    full: opt.Full = False,
    precision: opt.PrecisionOption = Precision.FP32,
    device: opt.Device = "auto",
    cache_budget: opt.CacheBudget = None,
    target: opt.Target = None,
    steer_target: opt.SteerTarget = False,
    encoder: opt.Encoder = None,
    gradient: opt.GradientChoice = None,
    top: opt.Top = 3,
    goal: opt.Goal = 90.0,
    images: opt.ConceptBudget = 20,
    others: opt.OthersBudget = 40,
    question: opt.Questions = None,
    judge: opt.Judge = None,
    judge_pretrained: opt.JudgePretrained = None,
    denoise: opt.Denoise = 20,
    guidance: opt.Guidance = None,
) -> None:
    """Find each front layer's step size and write the best edit.

    Several sets are searched one after another; with --joint, for edits that forget all
    their concepts together. With --target and --steer-target, layer and step are found on
    that model itself.

    Example: slsgu search facebook --steer fa5
    """
    if steer_target or target is not None:
        from slsgu_cli.cli.downstream import search_on_target
        from slsgu_cli.records.targets import Budget, PaintOptions

        search_on_target(
            session,
            names,
            target if steer_target else None,
            budget=Budget(
                concept=images,
                others=others,
                paint=PaintOptions(steps=denoise, guidance=guidance),
                **opt.given(questions=tuple(question) if question else None),
            ),
            judge=(judge, judge_pretrained),
            layers=layer or (),
            top=top,
            gradient_of=gradient,
            goal=goal,
            steps=steps,
            full=full,
            encoder=encoder,
            device=device,
            **opt.along(direction, ridge),
            **opt.given(qkv=qkv),
        )
        return
    from slsgu_cli.cli.study import search_jointly, search_sets
    from slsgu_cli.method.search_plan import SearchOptions

    options = SearchOptions(
        layers=layer or (),
        direction=direction,
        ridge=ridge,
        qkv=qkv,
        steer=steer,
        **opt.given(margin=margin),
        steps=steps,
        full=full,
        precision=precision,
        device=device,
        cache_budget=opt.size(cache_budget),
    )
    run = search_jointly if joint else search_sets
    run(session, names, options)


@command(app, "apply")
def apply(
    session: Session,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME|EDIT...", help="Sets, or edit files.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the new checkpoint goes.")],
    model: opt.Model = None,
    pretrained: opt.Pretrained = None,
    target: Annotated[
        Path | None,
        typer.Option("--target", "-t", help="Edit this model built on CLIP: folder or file."),
    ] = None,
    encoder: opt.Encoder = None,
    layer: Annotated[
        str | None, typer.Option("--layer", help="Move this layer along its direction, unsearched.")
    ] = None,
    step: Annotated[
        float | None, typer.Option("--step", help="Step size, instead of the one searched for.")
    ] = None,
    direction: opt.DirectionOption = None,
    ridge: opt.Ridge = None,
    qkv: opt.QkvOption = None,
    scale: Annotated[float, typer.Option("--scale", help="Apply this much of the edit.")] = 1.0,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Keep this many singular directions of the edit."),
    ] = None,
    revert: Annotated[bool, typer.Option("--revert", help="Take the edits out again.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even to other weights.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is at --out.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and tell, write nothing.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links for the files of --target left as they are.")
    ] = False,
    device: opt.Device = "auto",
) -> None:
    """Write a copy of a model with edits in it.

    Example: slsgu apply facebook --target stable-diffusion --out sd-without-facebook
    """
    from slsgu_cli.cli import tables
    from slsgu_cli.method.edit import ApplyRequest, apply_named

    result = apply_named(
        session.store,
        ApplyRequest(
            names=names,
            out=out,
            model=opt.model_spec(model, pretrained),
            target=target,
            encoder=encoder,
            layer=layer,
            step=step,
            **opt.along(direction, ridge),
            qkv=qkv,
            scale=scale,
            rank=rank,
            revert=revert,
            force=force,
            overwrite=overwrite,
            dry_run=dry_run,
            link=link,
            device=device,
        ),
    )
    tables.applied(session.console, result)


@command(app, "eval")
def evaluate(
    session: Session,
    names: opt.Names,
    model: opt.Model = None,
    pretrained: opt.Pretrained = None,
    device: opt.Device = "auto",
) -> None:
    """Measure what is forgotten and what is kept.

    The original model is compared with --model, or else with the edits of the sets in
    memory.

    Example: slsgu eval facebook --model local-dir:clip-without-facebook
    """
    from slsgu_cli.cli import tables
    from slsgu_cli.method import evaluate as evaluation

    spec = opt.model_spec(model, pretrained)
    result = evaluation.evaluate(session.store, names, model=spec, device=device)
    tables.evaluated(session.console, result)


@command(app, "ls")
def ls(session: Session) -> None:
    """List what the store holds and what each thing was made from.

    Example: slsgu ls --json
    """
    from slsgu_cli.cli import tables
    from slsgu_cli.store.catalog import entries

    if not session.store.exists(""):
        session.console.note(f"there is no store {session.store.where('').rstrip('/')} yet")
    tables.listing(session.console, entries(session.store))


@command(app, "demo")
def demo(
    session: Session,
    concept: Annotated[
        str, typer.Argument(help="One of the 301 brands and objects of the embedded CLIP.")
    ] = "facebook",
    steer: opt.SteerOption = Steer.FA1,
    direction: opt.DirectionOption = None,
    ridge: opt.Ridge = None,
    device: opt.Device = "auto",
) -> None:
    """Make the embedded CLIP forget a brand, command by command.

    Example: slsgu demo castle --steer fa5
    """
    from slsgu_cli.cli.demo import demonstrate
    from slsgu_cli.method.ranking import RankOptions

    chosen = RankOptions(**opt.along(direction, ridge))
    demonstrate(session, concept, steer=steer, ranked=chosen, device=device)
