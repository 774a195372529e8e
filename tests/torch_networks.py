"""Networks written once, for `torch.nn` and for `cnn.layers`: both have the same names.

`python tests/torch_networks.py` writes tests/data/torch_networks.npz with torch (made with 2.13):
of each network its state_dict, an input (NCHW, float32) and its float64 output in eval mode.
"""
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "data" / "torch_networks.npz"
SIZES = {"exemplary": (2, 3, 8, 8), "every_layer": (2, 3, 11, 12), "rarer_layers": (2, 3, 9, 10)}


def exemplary(nn: Any, activation: str = "ReLU"):
    """Conv, activation, conv, activation, pool, activation, conv, activation, pool, linear."""
    def act():
        return getattr(nn, activation)()
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), act(), nn.Conv2d(4, 4, 3, padding=1), act(),
        nn.MaxPool2d(2), act(), nn.Conv2d(4, 6, 3, padding=1), act(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(6 * 2 * 2, 5))


def every_layer(nn: Any):
    """Each layer of common networks and each argument at least once, nested and named."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
                         nn.BatchNorm2d(8, eps=1e-3), nn.ReLU6(inplace=True))
    block = nn.Sequential(
        nn.Conv2d(8, 8, (3, 4), padding="same", dilation=(2, 1), groups=8), nn.BatchNorm2d(8),
        nn.Tanh(), nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.Sequential(nn.Dropout(0.2), nn.Conv2d(8, 6, 1, groups=2, padding="valid")),
        nn.Sigmoid(), nn.AvgPool2d((3, 2), stride=(2, 1), padding=1, ceil_mode=True),
        nn.AvgPool2d(3, 1, padding=(1, 0), count_include_pad=False),
        nn.MaxPool2d((2, 1), 1, 0, (2, 1)), nn.Conv2d(6, 6, 2, stride=(1, 2), padding=(1, 2)))
    head = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU(),
                         nn.Linear(6, 4, bias=False), nn.Softmax(dim=1))
    return nn.Sequential(OrderedDict(stem=stem, block=block, head=head))


def rarer_layers(nn: Any):
    """All others."""
    body = nn.Sequential(
        nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1, inplace=True),
        nn.LocalResponseNorm(3, alpha=0.5, beta=0.75, k=2.0), nn.ChannelShuffle(2),
        nn.Conv2d(8, 12, 1, groups=2), nn.Hardsigmoid(), nn.ChannelShuffle(3), nn.ZeroPad2d(1),
        nn.Conv2d(12, 8, 3), nn.ELU(0.5), nn.LocalResponseNorm(5), nn.Conv2d(8, 8, 1), nn.GELU(),
        nn.Hardswish(), nn.SiLU())
    head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 6),
                         nn.GELU(approximate="tanh"), nn.LayerNorm((6,), eps=1e-3),
                         nn.LogSoftmax(dim=1))
    return nn.Sequential(body, head)


NETWORKS = {"exemplary": exemplary, "every_layer": every_layer, "rarer_layers": rarer_layers}


def main() -> None:
    import torch
    torch.manual_seed(0)
    arrays = {}
    for name, make in NETWORKS.items():
        net = make(torch.nn).eval()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    torch.nn.init.normal_(tensor)
            if isinstance(module, torch.nn.LayerNorm):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias)
        arrays |= {f"{name}/state/{key}": value.numpy().copy()
                   for key, value in net.state_dict().items()}
        x = torch.randn(SIZES[name])
        arrays[f"{name}/input"] = x.numpy()
        arrays[f"{name}/output"] = net.double()(x.double()).detach().numpy()
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
