"""Which device a name means."""

import torch


def device_of_name(name: torch.device | str) -> torch.device:
    """The device called `name` ("auto": a GPU where there is one); ValueError for one not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(name).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but no GPU is visible; ask for cpu or auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()  # what has no memory to read is no device either
    except Exception as error:  # each kind of device has its own way to be missing
        raise ValueError(
            f"device is {name!r}, which is not there; ask for cpu, cuda, cuda:0, ... or auto"
        ) from error
    return device
