"""Back ends of the network's operators: plain torch or compiled kernels, chosen once for a model.

:mod:`.operators` is the registry, :mod:`.reference` what each operator is in plain torch,
:mod:`.fused` the compiled ones for CPUs, :mod:`.choice` the choice between them. Beside these the
memory that a calculation uses again (:mod:`.choice`), whole networks as a list of instructions
(:mod:`.instructions`), and functions of any network as graphs of torch's compiler (:mod:`.graphs`).
"""
