"""Exported models: TorchScript files for every engine with metatomic's interface.

The modules beside :mod:`pet_finetune.export.export` need the extra ``export`` (metatomic-torch and
metatensor-torch); it loads them once the extra is known to be installed.
"""
