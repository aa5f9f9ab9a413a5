"""`debiaskd prepare`: its options, and what it says when it is done."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from debiaskd.cli.arguments import natural, positive

if TYPE_CHECKING:
    from debiaskd.data import Prepared

_SOURCES = {
    "coco": "COCO 2014, 2017 or alike: SRC/annotations/instances_train2017.json and SRC/train2017/",
    "voc": "Pascal VOC 2007 or 2012: SRC or SRC/VOCdevkit/VOC2012 with ImageSets, Annotations, JPEGImages",
    "waterbirds": "Waterbirds: SRC/metadata.csv and its images; boxes of CUB-200-2011 if there are any",
    "celeba": "CelebA: SRC/img_align_celeba/, SRC/list_attr_celeba.txt and SRC/list_eval_partition.txt (or .csv)",
    "folder": "SRC/CLASS/… or SRC/train/CLASS/…, and CSV files with boxes, path,x0,y0,x1,y1[,label], and with what "
    "goes along with the class, which makes the groups: path,bias",
    "csv": "SRC.csv with the columns path and label and, if it has them, split, x0, y0, x1, y1 and attributes that "
    "make groups",
    "cifar": "CIFAR-10 or CIFAR-100: the binary or the Python version, or SRC/train*.npz and SRC/test*.npz",
    "mnist_on_cifar": "digits of SRC/mnist/ drawn on ships, trucks and horses of SRC/cifar10/: a shortcut of chosen "
    "strength, with boxes and groups",
    "digits": "scikit-learn's digits drawn on its two photographs, as in the quickstart: a shortcut of chosen "
    "strength, with boxes and groups, and nothing to download",
}
# Those whose images are all of one size, and square: how they are fitted makes no difference.
_SIZES = {"cifar": "32, their own", "mnist_on_cifar": "64", "digits": "48"}
_KEEP = "keep: like any other; drop: as if it were not annotated; mask: its class counts, its area is to be ignored"


def add(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    prepare = commands.add_parser(
        "prepare",
        help="decode a data set once, so that training reads pixels",
        description="Decodes the images of SRC into shards below OUT. Interrupted and started again it goes on; "
        "shards that are whole are never written again.",
    )
    sources = prepare.add_subparsers(
        dest="source", required=True, metavar="{" + ",".join(_SOURCES) + "}", parser_class=type(prepare)
    )
    for name, text in _SOURCES.items():
        _options(sources.add_parser(name, help=text, description=text), name)


def _options(parser: argparse.ArgumentParser, source: str) -> None:
    if source != "digits":
        source_help = ("SRC.csv", "the CSV file") if source == "csv" else ("SRC", "the data set as it is distributed")
        parser.add_argument("src", type=Path, metavar=source_help[0], help=source_help[1])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards, empty or begun before")
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help=f"side of the stored images; default: {_SIZES.get(source, '224')}",
    )
    if source not in _SIZES:
        parser.add_argument(
            "--fit",
            choices=("squash", "pad"),
            default="squash",
            help="squash to the square, or keep the shape, centred on black; default: %(default)s",
        )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes that decode; default: one for each core, one alone for few images",
    )
    parser.add_argument(
        "--format",
        choices=("npy", "litdata"),
        default="npy",
        help="npy: mapped into memory; litdata: chunks that may lie in object stores; default: %(default)s",
    )
    parser.add_argument("--split", action="append", metavar="NAME", help="only this one; may be given several times")
    wrong = parser.add_mutually_exclusive_group()
    wrong.add_argument("--strict", action="store_true", help="stop at the first thing that is wrong")
    wrong.add_argument(
        "--lenient",
        action="store_true",
        help="go on where more than 90 %% of a split's images or boxes, or of a list's rows, were passed over",
    )
    if source == "coco":
        parser.add_argument(
            "--crowd", choices=("keep", "drop", "mask"), default="keep", help=f"boxes of crowds: {_KEEP}"
        )
    if source == "voc":
        parser.add_argument(
            "--difficult", choices=("keep", "drop", "mask"), default="keep", help=f"difficult objects: {_KEEP}"
        )
    if source in ("coco", "voc"):
        what = "segmentations" if source == "coco" else "SegmentationClass/*.png"
        parser.add_argument("--masks", action="store_true", help=f"store masks besides the boxes: {what}")
    if source in ("waterbirds", "celeba", "folder", "csv"):
        what = "PNG files at the paths of the images, not 0 where the object is; stored besides the boxes"
        parser.add_argument("--masks", type=Path, metavar="DIR", help=what)
    if source == "waterbirds":
        parser.add_argument(
            "--boxes",
            type=Path,
            metavar="DIR",
            help="CUB's bounding_boxes.txt, and images.txt if it is there; default: SRC",
        )
    if source == "folder":
        for name in ("boxes", "bias"):
            help = f"default: SRC/{name}.csv, if it is there"
            parser.add_argument(f"--{name}", type=Path, metavar="CSV", help=help)
    if source == "csv":
        _columns(parser)
    if source == "celeba":
        for name, default, what in (("target", "Blond_Hair", "to be told"), ("bias", "Male", "that goes along")):
            parser.add_argument(
                f"--{name}", default=default, metavar="NAME", help=f"attribute {what}; default: %(default)s"
            )
    if source == "cifar":
        parser.add_argument(
            "--labels", choices=("fine", "coarse"), help="of CIFAR-100: 100 classes or 20; default: fine"
        )
    if source in ("mnist_on_cifar", "digits"):
        _drawing(parser)


def _columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder that the paths start from; default: that of SRC.csv"
    )
    for name in ("path", "label", "split"):
        parser.add_argument(
            f"--{name}-column", default=name, metavar="NAME", help=f"column with the {name}; default: %(default)s"
        )
    for name, what in (("label", "that is 1 where a class is shown"), ("bias", "of an attribute that makes groups")):
        parser.add_argument(
            f"--{name}-columns", type=_names, default=(), metavar="A,B", help=f"columns, each {what}; default: none"
        )


def _drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--agreement",
        type=_share,
        default=0.95,
        metavar="P",
        help="share of the training images whose photograph agrees with the class; default: %(default)s",
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")
    for name, count in (("train", 6000), ("val", 1000), ("test", 2000)):
        parser.add_argument(
            f"--{name}", type=positive, default=count, metavar="N", help="number of images; default: %(default)s"
        )


def run(options: argparse.Namespace, progress: Callable[[str, float], None]) -> list[str]:
    """Does it; returns what is to be printed.

    Raises:
        as `debiaskd.data.prepare`.
    """
    from debiaskd.data import prepare

    rest = dict(vars(options))  # size, fit, … and the source's own, by their names in `prepare`
    src = rest.pop("src", None)
    for name in ("command", "overrides", "source", "out", "split", "workers"):
        del rest[name]
    if not rest.get("masks"):
        rest.pop("masks", None)
    prepared = prepare(
        options.source,
        src,
        options.out,
        splits=options.split,
        workers=options.workers,
        progress=progress,
        **rest,
    )
    return _summary(prepared, options.out)


def _summary(prepared: Prepared, out: Path) -> list[str]:
    manifest, problems = prepared.manifest, prepared.problems
    lines = [_split_line(name, split, manifest) for name, split in manifest["splits"].items()]
    lines.append(f"classes: {_listed(manifest['classes'], ', ')}")
    if manifest["groups"]:
        lines.append(f"groups: {_listed(manifest['groups'], '; ')}")
    if problems.notes:
        lines += ["read with a correction, or worth a look:", *problems.note_lines()]
    if problems.found:
        lines += ["passed over:", *problems.lines(), f"all of them: {out / 'problems.txt'}"]
    if prepared.reused:
        lines.append(f"shards: {prepared.written} written, {prepared.reused} were there already")
    return [*lines, str(out / "manifest.json")]


def _split_line(name: str, split: dict[str, Any], manifest: dict[str, Any]) -> str:
    """ "train: 40 images, 52 boxes, 2 left out; 20 annotated, 2 of 3 classes (not: cat), 4 of 4 groups"."""
    line = f"{name}: {split['count']} images, {split['boxes']} boxes"
    if "masks" in split:
        line += f", {split['masks']} with masks"
    if split["skipped"]:
        line += f", {len(split['skipped'])} left out"
    parts = [] if split["annotated"] == split["count"] else [f"{split['annotated']} annotated"]
    for what, counts, separator in (("classes", "class_counts", ", "), ("groups", "group_counts", "; ")):
        names = manifest[what]
        missing = [label for label, count in zip(names, split[counts]) if not count]
        if names:
            absent = f" (not: {_listed(missing, separator, 5)})" if missing else ""
            parts.append(f"{len(names) - len(missing)} of {len(names)} {what}{absent}")
    return f"{line}; {', '.join(parts)}"


def _listed(names: Sequence[str], separator: str, shown: int = 100) -> str:
    more = f"{separator}and {len(names) - shown} more" if len(names) > shown else ""
    return separator.join("".join(c if c.isprintable() else "?" for c in name) for name in names[:shown]) + more


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names separated by commas, got {text!r}")
    return names


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share in [0, 1], got {text!r}")
    return value
