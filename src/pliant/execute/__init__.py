"""What a value makes run: every executor in a masked and a gathered form that agree."""

from __future__ import annotations

from pliant.execute.cells import Cell, Encoded, GRUStep, LSTMStep, Pressed, SmallLSTM
from pliant.execute.chain import Chain, Forget, Remember
from pliant.execute.channels import Channels, Chosen, Unpacked
from pliant.execute.collaboration import InlineHead, collaborative
from pliant.execute.cursor import Classify, Cursor, Jump, Move, Open, Piece, Place, Reader, Reading, Said, Say, Store
from pliant.execute.deformed import Deformed
from pliant.execute.equilibrium import equilibrium, scale_all, scale_last
from pliant.execute.exits import Answer, Exits, MostConfident, MostUseful
from pliant.execute.experts import Experts
from pliant.execute.halting_pixels import HaltingMap, HaltingPixels
from pliant.execute.heads import Linked
from pliant.execute.hierarchy import Hierarchy, Level
from pliant.execute.hyper import GrownConv2d, KernelGenerator, ScaledLSTM
from pliant.execute.kernels import (
    Adapted,
    DynamicReLU,
    Filtered,
    GeneratedConv2d,
    MixedConv2d,
    Operation,
    Scaled,
    ScaledPlaces,
    Steps,
)
from pliant.execute.levels import Levels
from pliant.execute.loop import Halted, Halting
from pliant.execute.norm import NormBank
from pliant.execute.pixels import Branch, Pixels
from pliant.execute.planned import Planned
from pliant.execute.points import Refine
from pliant.execute.reassembly import Reassemble
from pliant.execute.regions import Affine, Attention, Look, Projective, Region, ThinPlate, Warp, Window
from pliant.execute.routes import Node, Routes
from pliant.execute.select import Select
from pliant.execute.skip import Carried, Residual, Skip
from pliant.execute.steps import Hold, Partial, Recurrent
from pliant.execute.tokens import Drop, Merge, Reduce, Tokens, TokenView
from pliant.execute.trees import Trees

__all__ = [
    "Adapted",
    "Affine",
    "Answer",
    "Attention",
    "Branch",
    "Carried",
    "Cell",
    "Chain",
    "Channels",
    "Chosen",
    "Classify",
    "Cursor",
    "Deformed",
    "Drop",
    "DynamicReLU",
    "Encoded",
    "Exits",
    "Experts",
    "Filtered",
    "Forget",
    "GRUStep",
    "GeneratedConv2d",
    "GrownConv2d",
    "Halted",
    "Halting",
    "HaltingMap",
    "HaltingPixels",
    "Hierarchy",
    "Hold",
    "InlineHead",
    "Jump",
    "KernelGenerator",
    "LSTMStep",
    "Level",
    "Levels",
    "Linked",
    "Look",
    "Merge",
    "MixedConv2d",
    "MostConfident",
    "MostUseful",
    "Move",
    "Node",
    "NormBank",
    "Open",
    "Operation",
    "Partial",
    "Piece",
    "Pixels",
    "Place",
    "Planned",
    "Pressed",
    "Projective",
    "Reader",
    "Reading",
    "Reassemble",
    "Recurrent",
    "Reduce",
    "Refine",
    "Region",
    "Remember",
    "Residual",
    "Routes",
    "Said",
    "Say",
    "Scaled",
    "ScaledLSTM",
    "ScaledPlaces",
    "Select",
    "Skip",
    "SmallLSTM",
    "Steps",
    "Store",
    "ThinPlate",
    "TokenView",
    "Tokens",
    "Trees",
    "Unpacked",
    "Warp",
    "Window",
    "collaborative",
    "equilibrium",
    "scale_all",
    "scale_last",
]
