"""Changes from a config to a config."""

import fiddle as fdl


def smoke(config: fdl.Config, steps: int = 1) -> None:
    config.optimizer[0].steps = steps
    config.model.blocks = config.model.blocks[:1]


def renamed(config: fdl.Config, name: str) -> fdl.Config:
    return fdl.copy_with(config, name=name)


def idle(config: fdl.Config) -> fdl.Config:
    return config


def misfit(config: fdl.Config) -> None:
    config.modle = 1
