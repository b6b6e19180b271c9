"""Interactions, where they come from, and how they are split."""

from fedjax_rec.data.align import align as align
from fedjax_rec.data.interactions import Interactions as Interactions
from fedjax_rec.data.interactions import from_rows as from_rows
from fedjax_rec.data.split import Split as Split
from fedjax_rec.data.split import global_temporal as global_temporal
from fedjax_rec.data.split import leave_given_out as leave_given_out
from fedjax_rec.data.split import leave_one_out as leave_one_out
from fedjax_rec.data.split import predefined_split as predefined_split
from fedjax_rec.data.split import ratio_split as ratio_split
from fedjax_rec.data.split import strong_generalization as strong_generalization
from fedjax_rec.data.split import with_candidates as with_candidates
from fedjax_rec.data.synthetic import synthetic as synthetic
from fedjax_rec.data.ties import TIE_RULES as TIE_RULES
