"""Policy gradient methods.  Each overrides only the parts of its base class in which its paper differs."""

from pgsuite.algorithms.a2c import A2C
from pgsuite.algorithms.base import ActorCritic, Algorithm
from pgsuite.algorithms.channels import Channel
from pgsuite.algorithms.constrained import Constrained
from pgsuite.algorithms.cpo import CPO
from pgsuite.algorithms.distill import Distill
from pgsuite.algorithms.imitation import BC, Imitation
from pgsuite.algorithms.lagrangian import Lagrangian, PPOLagrangian, TRPOLagrangian
from pgsuite.algorithms.npg import NPG
from pgsuite.algorithms.ppo import PPO
from pgsuite.algorithms.ppo_penalty import PPOPenalty
from pgsuite.algorithms.reinforce import Reinforce
from pgsuite.algorithms.reppo import REPPO
from pgsuite.algorithms.rnd import RND
from pgsuite.algorithms.spo import SPO
from pgsuite.algorithms.trpo import TRPO
from pgsuite.algorithms.vmpo import VMPO

__all__ = [
    "A2C",
    "BC",
    "CPO",
    "NPG",
    "PPO",
    "REPPO",
    "RND",
    "SPO",
    "TRPO",
    "VMPO",
    "ActorCritic",
    "Algorithm",
    "Channel",
    "Constrained",
    "Distill",
    "Imitation",
    "Lagrangian",
    "PPOLagrangian",
    "PPOPenalty",
    "Reinforce",
    "TRPOLagrangian",
]
