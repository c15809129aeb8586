"""Starts the four services as processes of this machine, and stops them."""

from splitserve.launcher.config import SuiteConfig
from splitserve.launcher.signals import StopSignals
from splitserve.launcher.suite import LocalSuite

__all__ = ["LocalSuite", "StopSignals", "SuiteConfig"]
