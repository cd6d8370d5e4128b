"""How fast pet-finetune is beside metatrain: ``python -m benchmarks.speed`` (``make bench``)."""
