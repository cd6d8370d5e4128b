"""Exported models: TorchScript files for every engine with metatomic's interface.

Modules here that need metatomic and metatensor are loaded when they are called: their libraries
take a while.
"""
