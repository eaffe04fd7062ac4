"""What stands behind the cache of trained networks: descriptions of configurations, and files that are whole or absent, checked or not used."""

import contextlib
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def describe(value):
    """A JSON-able description of an argument, different where the training would be: tensors and networks go in as digests, a Dataset by name,
    split, length and digest, a function or partial by name and all its options, defaults included (outside advlab, with its source's digest too).
    ValueError for what cannot be described, such as a function that closes over variables."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return {"tensor": list(value.shape), "dtype": str(value.dtype), "sha256": digest(raw)}
    if isinstance(value, nn.Module):
        plain = [[name, type(m).__qualname__, {k: repr(v) for k, v in vars(m).items() if k[0] != "_" and k != "training"
                  and isinstance(v, bool | int | float | str | tuple)}] for name, m in value.named_modules()]
        live = [name for name, p in value.named_parameters() if p.requires_grad]
        return {"module": type(value).__qualname__, "sha256": fingerprint([plain, live, describe(value.state_dict())])}
    if hasattr(value, "digest"):
        return {"dataset": value.name, "split": value.split, "n": len(value), "digest": value.digest}
    function = value.func if isinstance(value, functools.partial) else value
    if not (inspect.isfunction(function) or inspect.isclass(function)) or getattr(function, "__closure__", None):
        raise ValueError(f"{value!r} cannot be described for the cache; use a function of a module, with functools.partial for its options")
    out = {"function": f"{function.__module__}.{function.__qualname__}"}
    out |= {k: describe(p.default) for k, p in inspect.signature(value).parameters.items() if p.default is not p.empty}
    if not function.__module__.startswith("advlab."):
        with contextlib.suppress(OSError, TypeError):  # typed at a prompt
            out["source"] = digest(inspect.getsource(function).encode())[:16]
    return out | ({"args": describe(value.args), **describe(value.keywords)} if isinstance(value, functools.partial) else {})


def fingerprint(value) -> str:
    """SHA-256 of a JSON-able value written with sorted keys, as 64 hex digits; ValueError for NaN."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def digest(raw) -> str:
    """SHA-256 of bytes, as 64 hex digits."""
    return hashlib.sha256(raw).hexdigest()


def to_bytes(state: dict) -> bytes:
    """A dict of tensors and plain values in torch's format, which is read without unpickling any code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(raw: bytes) -> dict:
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def seal(state: dict) -> bytes:
    """`to_bytes` with a digest of it at the end."""
    raw = to_bytes(state)
    return raw + hashlib.sha256(raw).digest()


def unseal(path: Path, key: str) -> dict:
    """The state sealed in a file, with state["key"] as given; ValueError where the file is damaged or has another key."""
    raw = path.read_bytes()
    if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
        raise ValueError("its digest does not fit its content, so that it is damaged or of another kind")
    state = from_bytes(raw[:-32])
    if state.get("key") != key:
        raise ValueError("it belongs to a training with other settings")
    return state


def load_weights(model: nn.Module, weights: Path, notes: Path, config: dict) -> dict:
    """Load a state dict into the model and return the notes beside it; an exception, before the model is touched, if anything is amiss."""
    if not notes.exists():
        raise ValueError(f"{notes.name} is missing")
    info, raw = json.loads(notes.read_bytes()), weights.read_bytes()
    if info["config"] != config:
        raise ValueError("it belongs to a training with other settings")
    if info["sha256"] != digest(raw):
        raise ValueError(f"its digest is not the one in {notes.name}, so that it is damaged or of another kind")
    state = from_bytes(raw)
    got, want = ({k: (v.shape, v.dtype) for k, v in tensors.items()} for tensors in (state, model.state_dict()))
    if got != want:
        raise ValueError(f"its tensors do not fit the model: {', '.join(k for k in got | want if got.get(k) != want.get(k))}")
    model.load_state_dict(state)
    return info


def write(path: Path, raw: bytes) -> None:
    """Write under a temporary name in the same folder, then rename; OSError, with the file as it was before, where that fails."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{path.name}.*.tmp"):  # left by processes that were killed while writing
            with contextlib.suppress(FileNotFoundError):  # another process has finished with it meanwhile
                if time.time() - old.stat().st_mtime > 3600:
                    old.unlink()
        with open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"could not save the checkpoint ({error.strerror}); what the file held before is intact", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def trusted(load: Callable[[], dict], path: Path, *companions: Path) -> dict | None:
    """load(), or None where there is no file at path. Where loading fails for what is in the file: a warning, the files moved aside, and None. Where
    the machine fails (no right to read, too many open files, no memory), its error: the file may be good."""
    if not path.exists():
        return None
    try:
        return load()
    except FileNotFoundError:  # another process has moved or removed it meanwhile
        return None
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        tags = (f".{i}.bad" if i else ".bad" for i in itertools.count())
        tag = next(tag for tag in tags if not Path(f"{path}{tag}").exists())
        for file in (path, *companions):
            with contextlib.suppress(FileNotFoundError):
                os.replace(file, f"{file}{tag}")
        warnings.warn(f"{path} is not used: {error}. It was moved to {path.name}{tag}; training starts anew", stacklevel=4)
        return None
