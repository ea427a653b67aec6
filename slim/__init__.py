"""slim: gates, dependency graph, planning and surgery for channel pruning of any ``torch.nn.Module``."""

from slim.atomic import write_atomically as write_atomically
from slim.atomic import write_text_atomically as write_text_atomically
from slim.channels import ChannelPropagation as ChannelPropagation
from slim.checkpoint import load as load
from slim.checkpoint import pack as pack
from slim.checkpoint import read as read
from slim.checkpoint import restore as restore
from slim.checkpoint import save as save
from slim.compose import chart as chart
from slim.compose import compare as compare
from slim.compose import compose as compose
from slim.errors import SlimError as SlimError
from slim.fold import fold_gates as fold_gates
from slim.forward import evaluation_mode as evaluation_mode
from slim.gate import CLOSED as CLOSED
from slim.gate import Gate as Gate
from slim.gate import add_gates as add_gates
from slim.gate import closed_gates_at_zero as closed_gates_at_zero
from slim.gate import closed_share as closed_share
from slim.gate import gate_parameters as gate_parameters
from slim.gate import gate_vectors as gate_vectors
from slim.gate import open_channels as open_channels
from slim.graph import ChannelGraph as ChannelGraph
from slim.graph import ChannelGroup as ChannelGroup
from slim.graph import Cost as Cost
from slim.ops import NORMS as NORMS
from slim.plan import Plan as Plan
from slim.proof import Proof as Proof
from slim.proof import max_difference as max_difference
from slim.proof import prove as prove
from slim.propagate import Call as Call
from slim.propagate import cost as cost
from slim.rules import register_rule as register_rule
from slim.score import score as score
from slim.solver import make_plan as make_plan
from slim.sparsity import BudgetL1 as BudgetL1
from slim.sparsity import L1Step as L1Step
from slim.sparsity import SmallestHalfL1 as SmallestHalfL1
from slim.sparsity import strength_for as strength_for
from slim.surgery import apply_plan as apply_plan
from slim.surgery import mask as mask
from slim.trace import trace as trace
from slim.widths import layer_widths as layer_widths

__version__ = "0.2.0"
