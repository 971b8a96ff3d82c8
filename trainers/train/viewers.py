"""A run's metrics in a viewer, besides metrics.jsonl: the same names, numbers and steps.

Each package is an extra, imported when it is asked for: `pip install "puna[tensorboard]"`,
`"puna[trackio]"`, `"puna[wandb]"`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex

from puna.core.checkpoint.atomic import write_text
from puna.core.errors import UserError

Show = Callable[[int, Mapping[str, float]], None]  # (step, numbers by name)


def viewer(name: str, folder: Path) -> Show:
    """What shows a row of the run in `folder`; "none" shows nothing.

    Nothing is written before the first row. Raises ValueError where the package is missing;
    what it gives raises UserError where the package fails.
    """
    if name == "none":
        return lambda step, values: None
    try:
        show = VIEWERS[name](folder)
    except ImportError as error:  # it is not there, or not whole
        raise ValueError(
            f"log is {name}, but that package is not installed ({error}); "
            f"pip install 'puna[{name}]', or leave the option out"
        ) from error

    def safely(step: int, values: Mapping[str, float]) -> None:
        try:
            show(step, values)
        except Exception as error:  # nobody is logged in, a service that cannot be reached
            why = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{name} could not show step {step} ({why}); put that right or leave log out: "
                "the same command continues"
            ) from error

    return safely


def tensorboard(folder: Path) -> Show:
    """Event files in the run's own folder; what a resumed run repeats is not shown twice."""
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def show(step: int, values: Mapping[str, float]) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder / "tensorboard"), purge_step=step))
        for name, value in values.items():
            writers[0].add_scalar(name, value, step)
        writers[0].flush()

    return show


def trackio(folder: Path) -> Show:
    """A run of the project that the run's parent folder names, in trackio's own place: of a name of
    its own, since runs of one name are one run there."""
    import trackio as package

    runs: list[package.Run] = []

    def show(step: int, values: Mapping[str, float]) -> None:
        if not runs:
            place = folder.resolve()
            name = f"{place.name}-{own_id(place, '.trackio-id')[:6]}"
            runs.append(
                package.init(project=place.parent.name or "puna", name=name, resume="allow")
            )
        runs[0].log(dict(values), step=step)

    return show


def wandb(folder: Path) -> Show:
    """A run of the project that the run's parent folder names; where it goes, and whether it goes
    anywhere, say wandb's own settings. A run that is continued goes on there, too, by the name that
    the folder keeps; wandb leaves out what a resumed run repeats."""
    import wandb as package

    runs: list[package.Run] = []

    def show(step: int, values: Mapping[str, float]) -> None:
        if not runs:
            place = folder.resolve()
            runs.append(
                package.init(
                    project=place.parent.name or "puna", name=place.name, dir=str(place),
                    id=own_id(place, ".wandb-id"), resume="allow", reinit="create_new",
                )
            )  # fmt: skip
        runs[0].log(dict(values), step=step)

    return show


def own_id(folder: Path, name: str) -> str:
    """What the run in `folder` is called by a viewer. It stays so where the folder is moved; one
    that was copied is another run. The file `name` there has it, and the folder that it was of."""
    file = folder / name
    if file.exists():
        own, _, before = file.read_text(encoding="utf-8").partition("\n")
        first = Path(before, name)
        copied = before not in ("", str(folder)) and first.exists()
        if not (copied and first.read_text(encoding="utf-8").partition("\n")[0] == own):
            write_text(file, f"{own}\n{folder}")
            return own
    own = token_hex(8)
    write_text(file, f"{own}\n{folder}")
    return own


VIEWERS = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}
