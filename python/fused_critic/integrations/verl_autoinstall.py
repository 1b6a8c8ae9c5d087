"""Importing this module installs fused_critic into verl; for VERL_USE_EXTERNAL_MODULES (see fused_critic.integrations.verl)."""

from . import verl

verl.install()
