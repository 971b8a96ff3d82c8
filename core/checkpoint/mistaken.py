"""What stands at a path where a model was expected: in true words, with the way out."""

from pathlib import Path

PICKLED = "Puna reads no pickled weights: save the model again as safetensors"


def check_file(path: Path) -> None:
    """ValueError saying what the file at `path`, which is no model folder, is; silent where there
    is none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        begin = file.read(8)
    if begin.startswith(b"GGUF"):
        raise ValueError(f"{path} is a GGUF file; give it a name that ends in .gguf")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is a file of weights; give its folder, {path.parent}")
    if begin.startswith(b"PK") or path.suffix in (".pt", ".pth"):
        raise ValueError(f"{path}: {PICKLED}")


def check_folder(path: Path) -> None:
    """ValueError saying what the folder at `path` is, where it lacks a model's files; silent where
    nothing tells."""
    if (path / "config.toml").exists():
        _check_run(path)
    if files := sorted(path.glob("*.gguf")):
        raise ValueError(f"{path} holds GGUF files; give one of them, such as {files[0]}")
    if any(path.glob("consolidated.*.pth")):
        raise ValueError(f"{path} holds Meta's weights without their params.json; fetch that, too")
    shards = sorted(path.glob("model-*.safetensors"))
    if shards and not (path / "model.safetensors.index.json").exists():
        raise ValueError(
            f"{path} holds {shards[0].name} and no model.safetensors.index.json, which says what "
            "is in which file; fetch it"
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ValueError(f"{path} holds no model.safetensors; {PICKLED}")


def _check_run(path: Path) -> None:
    if (path / "model" / "config.json").exists():
        raise ValueError(f"{path} is a run's folder; its model is {path / 'model'}")
    saved = sorted(path.glob("checkpoints/step-*/config.json"))
    newest = f"its newest checkpoint is {saved[-1].parent}" if saved else "it has no checkpoint yet"
    raise ValueError(f"{path} is the folder of a run that is not finished; {newest}")
