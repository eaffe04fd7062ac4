"""torchvision's ImageNet classifiers for 224-299 px behind the interface of the small ones: [0,1] images in, logits out.

The networks are taken apart into the same named children (``normalize``, ``stem``, ``layer1``, ..., ``pooled``, ``logits``), so
that attacks, defences and `layer_names` need not know where a classifier came from.
"""

from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from .layers import Normalize

# What the published weights were trained with.
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TORCHVISION = {"resnet50": _IMAGENET, "resnet152": _IMAGENET, "inception_v3": {"mean": 0.5, "std": 0.5}}


def torchvision_classifier(name: str, weights: str | Path | None = "DEFAULT", *, num_classes: int = 1000) -> nn.Sequential:
    """resnet50, resnet152 (224 px) or inception_v3 (299 px) in eval mode: (B,3,H,W) in [0,1] -> logits (B, num_classes).

    ``weights``: "DEFAULT" downloads torchvision's best into torch.hub's cache, None leaves the network untrained, anything
    else is the path of a state dict in torchvision's naming. Inception's auxiliary head is dropped. ValueError for an
    unknown name or a file that does not fit; FileNotFoundError when weights are neither here nor to be downloaded.
    """
    if name not in TORCHVISION:
        raise ValueError(f"Unknown torchvision classifier {name!r}; choose one of {', '.join(TORCHVISION)}.")
    from torchvision import models

    inception = name == "inception_v3"
    options = {"init_weights": False, "aux_logits": False} if inception else {}
    net = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if weights is not None:
        state = _download(name, models.get_model_weights(name).DEFAULT) if weights == "DEFAULT" else _read(Path(weights))
        try:
            net.load_state_dict({key: value for key, value in state.items() if not key.startswith("AuxLogits.")})
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"weights={str(weights)!r} do not fit {name} with num_classes={num_classes}; give a state dict in torchvision's "
                "naming with as many classes."
            ) from error
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    parts = _inception_parts(net) if inception else _resnet_parts(net)
    return nn.Sequential(OrderedDict(normalize=Normalize(**TORCHVISION[name]), **parts, logits=net.fc)).eval()


def _resnet_parts(net: nn.Module) -> dict[str, nn.Module]:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    stages = {f"layer{i}": getattr(net, f"layer{i}") for i in (1, 2, 3, 4)}
    return {"stem": stem, **stages, "pooled": nn.Sequential(net.avgpool, nn.Flatten())}


def _inception_parts(net: nn.Module) -> dict[str, nn.Module]:
    stem = (net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.maxpool1)
    stem += (net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, net.maxpool2)
    stages = {}
    for i in (1, 2, 3):
        blocks = [block for key, block in net.named_children() if key.startswith(f"Mixed_{i + 4}")]
        stages[f"layer{i}"] = nn.Sequential(*blocks)
    return {"stem": nn.Sequential(*stem), **stages, "pooled": nn.Sequential(net.avgpool, net.dropout, nn.Flatten())}


def _download(name: str, weights) -> dict:
    try:
        return weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise FileNotFoundError(
            f"The weights of {name} could not be had ({error}). Without network, fetch {weights.url} elsewhere and put it "
            f"at {file}, or pass its path as weights; weights=None gives the untrained network."
        ) from error


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"No weights at {path}; give the path of a state dict, 'DEFAULT' or None.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a state dict: cut short, or another format.") from error
