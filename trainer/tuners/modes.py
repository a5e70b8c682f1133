"""Training mode for a partly frozen network: what is frozen behaves as it did when it was evaluated."""

from __future__ import annotations

from torch import nn


def train_what_is_trainable(network: nn.Module) -> None:
    """Put every module that holds a trainable parameter, at any depth, in training mode and all others not.

    Modules without parameters (dropout, drop path) follow the module that they are part of; those of the network
    itself, which act on frozen and trained parts alike, train only if all of the network does.
    """
    network.train()
    whole = all(parameter.requires_grad for parameter in network.parameters())
    for child in network.children():
        _set_mode(child, whole)


def _set_mode(module: nn.Module, parent: bool) -> None:
    parameters = list(module.parameters())
    module.training = any(value.requires_grad for value in parameters) if parameters else parent
    for child in module.children():
        _set_mode(child, module.training)
