"""What molecules are grown from, small partners for clusters and boxes, and what is left out."""

from __future__ import annotations

__all__ = ["CORES", "ELEMENTS", "LEFT_OUT", "PARTNERS", "SUBSTITUENTS"]

ELEMENTS = ("H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Br", "I")

CORES = (
    "C", "CC", "CCC", "CC(C)C", "C=C", "C#C", "C=C=C", "CC=CC", "C=CC=C", "C1CC1", "C1CCC1",
    "C1CCCC1", "C1CCCCC1", "C1=CCCC1", "C1=CCCCC1", "C1CO1", "C1CN1", "C1CS1", "C1COC1", "C1CNC1",
    "C1CCOC1", "C1CCNC1", "C1CCSC1", "C1COCCN1", "C1COCCO1", "C1CNCCN1", "O1COCC1", "C1CC[SiH2]C1",
    "c1ccccc1", "c1ccncc1", "c1cnccn1", "c1cncnc1", "c1ccnnc1", "c1ncncn1", "c1ccoc1", "c1ccsc1",
    "c1cc[nH]c1", "c1cocn1", "c1cscn1", "c1c[nH]cn1", "c1cc[nH]n1", "c1nnco1", "c1nncs1",
    "c1nn[nH]n1", "c1ccc2[nH]ccc2c1", "c1ccc2occc2c1", "c1ccc2sccc2c1", "c1ccc2ncccc2c1",
    "c1cc2cccc2c1", "C1CC2CC1C2", "C1CC2CCC1C2", "O=C1CCCC1", "O=C1CCCN1", "O=C1CCCO1",
    "O=C1C=CCN1", "O=C1CNC(=O)N1", "O=c1cc[nH]cc1", "N", "O", "S", "P", "[SiH4]", "B", "NN", "OO",
    "SS", "NO", "C=N", "C=O", "C=S", "C#N", "N=N", "C(=O)N", "C(=O)O", "C(=O)OC", "NC(=O)N",
    "NC(=N)N", "OC(=O)O", "C=C=O", "N=C=O", "N=C=S", "CON", "CSC", "CSSC", "COC", "CNC", "COCOC",
    "CS(=O)C", "CS(=O)(=O)C", "CS(=O)(=O)N", "OS(=O)(=O)C", "CP(C)C", "CP(=O)(C)C",
    "CP(=O)(O)O", "COP(=O)(OC)OC", "C[SiH2]C", "C[SiH](C)O", "O[SiH2]O[SiH3]", "[SiH3][SiH3]",
    "CB(O)O", "OB(O)O", "CB(C)C", "B1OCCO1", "C1=CB=CC=C1", "B(N)N", "CN(C)C", "CC(C)(C)C",
    "FC(F)F", "ClCCl", "BrCBr", "ICI", "FS(F)(F)(F)(F)F", "FP(F)F", "ClP(Cl)Cl", "FB(F)F",
    "F[Si](F)(F)F",
)  # fmt: skip

SUBSTITUENTS = (
    "C", "C", "C", "CC", "C(C)C", "C=C", "C#C", "C1CC1", "c1ccccc1", "c1ccncc1", "c1ccoc1",
    "c1ccsc1", "O", "O", "O", "OC", "OCC", "OC=O", "OO", "N", "N", "N", "NC", "N(C)C", "NN", "NO",
    "N=C", "NC=O", "C=O", "C(=O)C", "C(=O)O", "C(=O)OC", "C(=O)N", "C(=O)NC", "C(=O)F", "C(=O)Cl",
    "C#N", "N=C=O", "N=[N+]=[N-]", "[N+](=O)[O-]", "S", "SC", "S(=O)C", "S(=O)(=O)C", "S(=O)(=O)N",
    "S(=O)(=O)O", "SC#N", "C(=S)N", "F", "F", "F", "C(F)(F)F", "CF", "OC(F)(F)F", "Cl", "Cl", "CCl",
    "C(Cl)(Cl)Cl", "Br", "Br", "CBr", "I", "I", "CI", "P", "P(C)C", "P(=O)(O)O", "P(=O)(C)C",
    "OP(=O)(O)O", "[SiH3]", "[Si](C)(C)C", "[SiH2]C", "O[SiH3]", "[SiH2]F", "[SiH2]Cl", "B(O)O",
    "B(C)C", "BO", "B(F)F", "B(N)N", "C[SiH3]", "CS", "CP", "CO", "CN", "CCO", "CCN", "CC#N",
)  # fmt: skip

# Single molecules, or two and more of them beside each other or in a box.
PARTNERS = (
    "O", "O", "O", "O", "CO", "CO", "CCCO", "CC(C)O", "OCCO", "N", "N", "CN(C)C", "C", "CC", "C=C",
    "C#C", "O=C=O", "C=O", "CC(C)=O", "C(=O)O", "CC(=O)O", "C(=O)N", "CC(=O)N", "CNC=O", "C#N",
    "CC#N", "S", "CS", "CSC", "CS(C)=O", "O=S=O", "F", "CF", "FC(F)F", "Cl", "CCl", "ClCCl",
    "ClC(Cl)Cl", "Br", "CBr", "I", "CI", "P", "CP", "[SiH4]", "C[SiH3]", "FB(F)F", "OB(O)O", "COC",
    "C1CCOC1", "c1ccoc1", "c1ccsc1", "c1ccncc1", "c1cc[nH]c1", "c1c[nH]cn1", "Fc1ccccc1", "NN",
    "OO", "[H][H]", "N#N", "ClCl", "BrBr", "FF", "C[N+](=O)[O-]", "NC(N)=O", "NCC(=O)O",
)  # fmt: skip

# Molecules of public benchmark sets that people fine-tune on (3BPA, rMD17, acetylacetone) and of
# the sets that ship here: a foundation that had seen them would make every comparison meaningless.
# As single molecules, in clusters and in boxes. Water is the one exception.
LEFT_OUT = (
    "Nc1ncccc1OCc1ccccc1", "CC(=O)CC(C)=O", "CC(=O)C=C(C)O", "CC(=O)Oc1ccccc1C(=O)O",
    "c1ccc(N=Nc2ccccc2)cc1", "c1ccccc1", "CCO", "O=CCC=O", "OC=CC=O", "c1ccc2ccccc2c1",
    "CC(=O)Nc1ccc(O)cc1", "O=C(O)c1ccccc1O", "Cc1ccccc1", "O=c1cc[nH]c(=O)[nH]1", "CC=O", "CN",
)  # fmt: skip
