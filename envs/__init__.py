"""Environments: on-device MDPs, Gymnasium environments as record streams, adapters."""
