"""Which device a name means."""

import torch


def device_of_name(name: torch.device | str) -> torch.device:
    """The device called `name` ("auto": a GPU where there is one); ValueError for one not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(name).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but no GPU is visible; ask for cpu or auto")
    return torch.device(name)
