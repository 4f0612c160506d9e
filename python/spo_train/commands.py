"""The commands of `spo-train`. A command imports its parts when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spo_train.config import (
    QUICK_DEMO,
    AlignConfig,
    DemoConfig,
    EvaluateConfig,
    PairsConfig,
    PretrainConfig,
    RunConfig,
    Settings,
)
from spo_train.errors import RunError

if TYPE_CHECKING:
    from spo_train.pretrain import PretrainResult
    from spo_train.protocol import TextTokenizer, TrainableModel

BAD_INPUT = 2

F = TypeVar("F", bound=Callable[..., Any])


class RenamedOption(click.Option):
    """An option whose earlier names still work; `--help` shows only the present name."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        every_name, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = every_name


def settings_options(
    config: type[Settings], *, prefix: str = "", earlier_prefix: str | None = None, unset: bool = False
) -> Callable[[F], F]:
    """Make one option of each field of a settings dataclass, with the field's type, default, choices, range and help.

    Args:
        config: the dataclass.
        prefix: put before the names of the options.
        earlier_prefix: prefix of the options in earlier versions, whose names still work.
        unset: pass None for an option that was not given, instead of the default.
    """
    hints = typing.get_type_hints(config)

    def flag(prefix: str, name: str) -> str:
        return f"--{prefix}{name}".replace("_", "-")

    def decorate(function: F) -> F:
        for field in reversed(fields(config)):
            must_be = field.metadata["must_be"]
            bounds = "" if isinstance(must_be, tuple) else f"; {must_be}"
            names = [flag(prefix, field.name)]
            if earlier_prefix is not None:
                names.append(flag(earlier_prefix, field.name))
            if field.metadata["earlier_name"]:
                names.append(flag(prefix, field.metadata["earlier_name"]))
            function = click.option(
                *names,
                prefix + field.name,
                cls=RenamedOption,
                type=_option_type(must_be, hints[field.name]),
                default=None if unset else field.default,
                help=f"{field.metadata['help']}  [default: {field.metadata['default']}{bounds}]",
            )(function)
        return function

    return decorate


def _option_type(must_be: str | tuple[str, ...], hint: Any) -> Any:
    if isinstance(must_be, tuple):
        return click.Choice(must_be)
    if isinstance(hint, types.UnionType):
        return next(member for member in typing.get_args(hint) if member is not type(None))
    return hint


def settings(config: type[Settings], options: dict[str, Any], *, prefix: str = "") -> Any:
    """Return the settings dataclass of a command's options."""
    names = [field.name for field in fields(config) if prefix + field.name in options]
    return config(**{name: options[prefix + name] for name in names})


class Commands(click.Group):
    """A command group that prints a failure as one line, without a traceback, if the user can mend it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (RunError, ValueError, OSError) as error:
            if ctx.params["traceback"]:
                raise
            rank = os.environ.get("RANK", "0") if _launched_processes() > 1 else "0"
            click.echo(f"Error: {error}" if rank == "0" else f"Error in process {rank}: {error}", err=True)
            ctx.exit(error.exit_code if isinstance(error, RunError) else BAD_INPUT)


FOLDER, FILE = click.Path(path_type=Path, file_okay=False), click.Path(path_type=Path, dir_okay=False)

out_folder = click.option("--out", type=FOLDER, required=True, help="Folder to write to; it is created.")
model_option = click.option(
    "--model",
    type=FOLDER,
    metavar="MODEL",
    help="Folder of a model, written by pretrain, align or Hugging Face transformers; or the name owner/model of one "
    "on the Hugging Face hub. [default: the shipped reference model]",
)
strings_option = click.option(
    "--strings",
    type=click.Choice(["text", "chat"]),
    help="How to read prompts that are strings, and their responses: as text, or as a user message and the assistant's "
    "reply, in the model's chat template. Needed where the tokenizer has a chat template. [default: text without one]",
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Device to run on, as torch names it: cpu, cuda, cuda:1."
)
prompts_option = click.option(
    "--prompts", type=FILE, help="UTF-8 file with a prompt on each line. [default: no prompt, sample freely]"
)


def resume_option(default: bool | None, otherwise: str) -> Callable[[F], F]:
    """Make the option that says whether a trainer resumes or replaces the run in its folder.

    Args:
        default: True resumes; with None the command refuses such a folder.
        otherwise: what `--help` says of the default.
    """
    return click.option(
        "--resume/--restart",
        default=default,
        help="Go on from the checkpoint in the folder, with the same losses; or start over, and replace the run there. "
        f"[default: {otherwise}]",
    )


def pretrain_options(function: F) -> F:
    """Add the options that pretrain and reference share."""
    options = (
        settings_options(PretrainConfig),
        resume_option(True, "resume; refuse a folder with a finished model"),
        # In earlier versions only --overwrite replaced a finished model.
        click.option("--overwrite", is_flag=True, hidden=True, help="Restart if the folder holds a finished model."),
        device_option,
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="spo_kernels", prog_name="spo-train")
@click.option("--traceback", is_flag=True, help="Show where an error arose instead of a single line.")
@click.pass_context
def cli(context: click.Context, traceback: bool) -> None:
    """Align language models with preference pairs, by Soft Preference Optimization (SPO) or DPO.

    \b
    The whole job on a small model, in about five minutes:
      spo-train demo --out demo
    With data of your own:
      spo-train pretrain texts/ --out base
      spo-train align --pairs pairs.jsonl --model base --out runs/spo
      spo-train evaluate runs/spo --reference base --judge my_module:score
    With a model of Hugging Face transformers, a folder or a name of the hub:
      spo-train align --pairs pairs.jsonl --model owner/model --out runs/spo
    """
    if _launched_processes() > 1 and context.invoked_subcommand != "align":
        raise ValueError(
            f"spo-train {context.invoked_subcommand} runs in one process, got WORLD_SIZE={_launched_processes()}: "
            "torchrun is for spo-train align"
        )


def _launched_processes() -> int:
    """Return how many processes torchrun started, without importing torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@cli.command(short_help="Train a tokenizer and a small Llama on plain text.")
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path))
@out_folder
@click.option("--per-line", is_flag=True, help="Each line is a document of its own, instead of each file.")
@click.option("--tokenizer", type=FILE, help="Sentencepiece .model file to use instead of training one.")
@pretrain_options
def pretrain(
    texts: tuple[Path, ...],
    out: Path,
    per_line: bool,
    tokenizer: Path | None,
    resume: bool,
    overwrite: bool,
    device: str,
    **options: Any,
) -> None:
    """Train a tokenizer and a small Llama on plain text.

    TEXTS are UTF-8 text files, or folders whose .txt files are used. Called again after an interruption, the command
    goes on from the last checkpoint.
    """
    config = settings(PretrainConfig, options)
    from spo_train import pretrain as pretraining
    from spo_train.text_data import read_corpus
    from spo_train.tokenizer import Tokenizer

    corpus = read_corpus(texts, per_line=per_line)
    for reason in corpus.skipped:
        click.echo(f"left out: {reason}", err=True)
    result = pretraining.pretrain(
        corpus.documents,
        out,
        config,
        tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
        device=_usable(device),
        restart=not resume or (overwrite and pretraining.holds_finished_model(out)),
    )
    _tell_model(out, result)


@cli.command(short_help="Train the shipped reference model again.")
@out_folder
@click.option(
    "--stories",
    type=click.IntRange(1),
    metavar="INTEGER",
    help="Stories to train on. [default: as many as the shipped model had]",
)
@pretrain_options
def reference(out: Path, stories: int | None, resume: bool, overwrite: bool, device: str, **options: Any) -> None:
    """Train the shipped reference model again, from the story grammar.

    The defaults are the recipe of the model in the package. They take some ten minutes on two cores.
    """
    config = settings(PretrainConfig, options)
    from spo_train.pretrain import holds_finished_model
    from spo_train.toy.reference import REFERENCE_STORIES, train_reference

    result = train_reference(
        out,
        config,
        story_count=REFERENCE_STORIES if stories is None else stories,
        device=_usable(device),
        restart=not resume or (overwrite and holds_finished_model(out)),
    )
    _tell_model(out, result)


@cli.command(short_help="Sample pairs of texts and have them judged.")
@model_option
@click.option("--out", type=FILE, required=True, help="JSONL file to write, all or nothing.")
@prompts_option
@strings_option
@settings_options(PairsConfig)
@device_option
def pairs(
    model: Path | None, out: Path, prompts: Path | None, strings: str | None, device: str, **options: Any
) -> None:
    """Make preference pairs: sample two texts, have both orders judged, keep clear winners.

    The judge is the embedded judge of stories. It scores from 0 to 10 with noise and favours the story shown second.
    As in section 6 of the paper, a pair is kept if the same story wins in both orders. It must lead by at least 2
    points where it is shown first, and by at least 3 where it is shown second.
    """
    config = settings(PairsConfig, options)
    from spo_train.sampling import read_prompts
    from spo_train.toy.make_pairs import make_pairs

    policy, tokenizer = _load(model, device, strings=strings, max_length=config.max_length)
    made = make_pairs(policy, tokenizer, out, config, prompts=read_prompts(prompts) if prompts else ("",))
    click.echo(
        f"{out}: {made.kept + made.repaired_kept} pairs: {made.kept} of {made.sampled} sampled pairs kept "
        f"({made.keep_rate:.1%}), {made.repaired_kept} more from pairing the samples anew; {made.agreement:.1%} agree "
        f"with the judge without its noise; mean score {made.mean_quality:.2f}"
    )


@cli.command(short_help="Align a model with preference pairs.")
@click.option(
    "--pairs",
    "pairs_file",
    type=FILE,
    required=True,
    help='File of {"prompt", "chosen", "rejected"}: JSON lines, a JSON array or CSV, also compressed by gzip, or '
    "parquet; or the name owner/dataset of one on the Hugging Face hub. Responses are strings or lists of messages. "
    "docs/data.md shows all formats.",
)
@click.option("--pairs-split", default="train", show_default=True, help="Split of a dataset of the hub.")
@strings_option
@out_folder
@model_option
@click.option(
    "--reference", type=FOLDER, metavar="MODEL", help="Folder or name of the reference. [default: the same as --model]"
)
@settings_options(AlignConfig)
@click.option(
    "--too-long",
    type=click.Choice(["truncate", "drop"]),
    default="truncate",
    show_default=True,
    help="Whether to truncate a response that exceeds the model's length, or to drop its pair.",
)
@resume_option(None, "refuse a folder with a run")
@settings_options(RunConfig)
@click.option(
    "--judge",
    help='Judge of the evaluations: "stories" (embedded), "module:function" from text to a score, or "none" to train '
    'without evaluations. [default: "stories" for the shipped model, else "none"]',
)
@settings_options(EvaluateConfig, prefix="evaluate_", earlier_prefix="eval_")
@device_option
def align(
    pairs_file: Path,
    pairs_split: str,
    strings: str | None,
    out: Path,
    model: Path | None,
    reference: Path | None,
    too_long: Any,
    resume: bool | None,
    judge: str | None,
    device: str,
    **options: Any,
) -> None:
    """Align a model with preference pairs.

    \b
    The folder gets run.json, metrics.jsonl (one line a step), evaluations.jsonl, checkpoint.safetensors,
    the aligned model in model/, and stories.jsonl with texts before and after.

    \b
    Several processes share the pairs and the samples of each step, with the losses of one process:
      torchrun --nproc-per-node 4 -m spo_train align --device cuda --pairs pairs.jsonl --out runs/spo
    Each of them holds the whole model.
    """
    config, run_config = settings(AlignConfig, options), settings(RunConfig, options)
    evaluate_config = settings(EvaluateConfig, options, prefix="evaluate_")
    from spo_train.alignment import run_alignment
    from spo_train.evaluate import Evaluator
    from spo_train.judges import load_judge
    from spo_train.pair_data import load_pairs
    from spo_train.ranks import launched
    from spo_train.run import refuse_existing

    if resume is None:
        refuse_existing(out)
    ranks, device = click.get_current_context().with_resource(launched(device))
    policy, tokenizer = _load(model, device, strings=strings, max_length=config.max_length)
    against = _load_reference(reference or model, device, tokenizer, max_length=config.max_length)
    length = min(policy.max_length, against.max_length)
    dataset, report = load_pairs(pairs_file, tokenizer, max_length=length, too_long=too_long, split=pairs_split)
    if ranks.is_first:
        click.echo(report.summary(), err=True)
    judge = judge or ("none" if model else "stories")
    evaluator = None
    if judge != "none" and ranks.is_first:
        evaluator = Evaluator.on_prompts_of(dataset, against, tokenizer, evaluate_config, judge=load_judge(judge))
    about = {
        "model": str(model or "shipped reference"),
        "reference": str(reference or model or "shipped reference"),
        "pairs": str(pairs_file),
        "read_as": dict(report.kinds),
        "judge": judge,
    }
    run_alignment(
        policy,
        against,
        tokenizer,
        dataset,
        config,
        out,
        evaluator=evaluator,
        about=about,
        resume=resume is True,
        restart=resume is False,
        ranks=ranks,
        **run_config.record(),
    )
    if ranks.is_first:
        click.echo(f"aligned model in {out / 'model'}")


@cli.command(short_help="Win rate of a model against the reference.")
@click.argument("model", type=FOLDER)
@click.option(
    "--reference",
    type=FOLDER,
    metavar="MODEL",
    help="Folder or name of the reference. [default: the shipped reference model]",
)
@click.option(
    "--judge", default="stories", show_default=True, help='"stories", or "module:function" from text to a score.'
)
@prompts_option
@strings_option
@click.option(
    "--max-length",
    type=click.IntRange(2),
    metavar="INTEGER",
    help="Tokens of the longest sample, prompt included. [default: the model's, of Hugging Face models at most 1024]",
)
@settings_options(EvaluateConfig)
@click.option("--texts", type=FILE, help="JSONL file to write the sampled texts and their scores to.")
@device_option
def evaluate(
    model: Path,
    reference: Path | None,
    judge: str,
    prompts: Path | None,
    strings: str | None,
    max_length: int | None,
    texts: Path | None,
    device: str,
    **options: Any,
) -> None:
    """Print a MODEL's win rate against the reference, its KL to the reference, and statistics of its texts, as JSON.

    MODEL is the folder of a model or of an alignment run, or the name of a model on the Hugging Face hub. The win rate
    comes with a 95 % band, which covers the sampling error only: other training seeds, data or judges vary the rate
    further.
    """
    config = settings(EvaluateConfig, options)
    from spo_train.evaluate import Evaluator
    from spo_train.files import write_jsonl
    from spo_train.judges import load_judge
    from spo_train.sampling import read_prompts

    policy, tokenizer = _load(model, device, strings=strings, max_length=max_length)
    against = _load_reference(reference, device, tokenizer, max_length=max_length)
    evaluator = Evaluator(
        against, tokenizer, config, judge=load_judge(judge), prompts=read_prompts(prompts) if prompts else ("",)
    )
    result = evaluator.evaluate(policy)
    if texts:
        write_jsonl(texts, [text.record() for text in result.texts])
    click.echo(json.dumps({"model": str(model), **result.metrics, "settings": config.record()}, indent=2))


@cli.command(short_help="Figure, table and stories of alignment runs.")
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@out_folder
@click.option(
    "--stories",
    type=click.IntRange(0),
    metavar="INTEGER",
    default=3,
    show_default=True,
    help="Stories before and after.",
)
def report(runs: tuple[Path, ...], out: Path, stories: int) -> None:
    """Draw win rate, KL and fluency of alignment RUNS in one figure; write a table and stories.

    RUNS are folders written by align with a judge.
    """
    from spo_train.report import MAIN_COLUMNS, markdown_table, read_runs, write_report

    read = read_runs(runs)
    for file in write_report(read, out, stories=stories):
        click.echo(str(file))
    click.echo("\n" + markdown_table(read, MAIN_COLUMNS))


@cli.command(short_help="The whole job, small, in about five minutes.")
@out_folder
@click.option("--quick", is_flag=True, help="Sizes that take seconds: they show that everything works, and no more.")
@click.option("--fresh", is_flag=True, help="Start over: remove an earlier demo from the folder.")
@device_option
@settings_options(DemoConfig, unset=True)
def demo(out: Path, quick: bool, fresh: bool, device: str, **options: Any) -> None:
    """The whole job on the shipped model: pairs, SPO, DPO, win rates, figure; about five minutes on two cores.

    The demo samples stories from the shipped reference model and has pairs of them judged. It aligns the model with SPO
    (alpha 0.1, beta 0.03, soft weights) and with DPO (beta 0.1 and 0.3), and compares each with the reference during
    training. Called again after an interruption, it goes on from where it stopped.
    """
    base = asdict(QUICK_DEMO) if quick else {}
    config = DemoConfig(**(base | {name: value for name, value in options.items() if value is not None}))
    from spo_train.toy.demo import run_demo

    run_demo(out, config, device=_usable(device), fresh=fresh, say=click.echo)


def _usable(device: str) -> str:
    """Return the device, or raise ValueError if torch cannot use it here."""
    import torch

    try:
        torch.empty(0, device=device).cpu()  # a meta tensor has no values to copy
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no CUDA, or meta
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {error}") from error
    return device


def _load(
    source: Path | None, device: str, *, strings: Any = None, max_length: int | None = None
) -> tuple[TrainableModel, TextTokenizer]:
    """Load model and tokenizer from the folder of a model or of a run, or from the hub; None loads the shipped ones."""
    from spo_train.models.loading import load_pretrained
    from spo_train.toy.reference import reference_folder

    device = _usable(device)
    if source is not None:
        return load_pretrained(source, device, strings=strings, max_length=max_length)
    with reference_folder() as folder:
        return load_pretrained(folder, device, strings=strings, max_length=max_length)


def _load_reference(
    source: Path | None, device: str, tokenizer: TextTokenizer, *, max_length: int | None
) -> TrainableModel:
    """Load a reference model. Raise ValueError unless its tokenizer gives every token the id that `tokenizer` gives."""
    # Samples of both are no longer than the model allows, so the shipped reference needs no limit of its own.
    reference, theirs = _load(source, device, max_length=max_length if source else None)
    if theirs.pieces() != tokenizer.pieces():
        raise ValueError(
            f"model and reference must have the same tokenizer, and that of {source or 'the shipped model'} differs"
            + ("" if source else ": pass --reference")
        )
    return reference


def _tell_model(out: Path, result: PretrainResult) -> None:
    click.echo(
        f"model in {out}: held-out NLL {result.nll_per_token:.4f} nats a token, {result.nll_per_sequence:.2f} a text"
    )
