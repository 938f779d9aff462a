"""Train a torch model from a DeepSpeed configuration: `engine, optimizer, loader, _ = zs_engine.initialize(...)`."""

from zs_comm import init_distributed

from zs_engine.data import DataLoader, RepeatingLoader
from zs_engine.engine import Engine
from zs_engine.initialize import initialize

__all__ = ["DataLoader", "Engine", "RepeatingLoader", "init_distributed", "initialize"]
