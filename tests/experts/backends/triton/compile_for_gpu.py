"""Run by test_triton.py in a process without the interpreter: compile what the backend launches for an absent GPU."""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from shunter import Routing
from shunter.experts import Weights
from shunter.experts.autograd import Needs
from shunter.experts.backends import triton as backend
from shunter.experts.backends.triton import _Triton
from shunter.experts.quantised import Coding, QuantisedWeights, pack

CAPABILITY, DTYPE = int(sys.argv[1]), getattr(torch, sys.argv[2])
run, found = JITFunction.run, []


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    found.append({"name": self.__name__, "shared": kernel.metadata.shared, "wgmma": "wgmma" in kernel.asm["ptx"]})


triton.runtime.driver.set_active(Driver())
JITFunction.run = compile_only

T, E, k, d, f = 256, 8, 2, 32, 32
x = torch.zeros(T, d, dtype=DTYPE)
weights = Weights(*(torch.zeros(*size, dtype=DTYPE) for size in ((E, 2 * f, d), (E, d, f), (E, 2 * f), (E, d))))
routing = Routing.from_topk(torch.rand(T, E).topk(k).indices, torch.rand(T, k), E)
plan = _Triton().plan(x, weights, routing)
_, h = _Triton().forward(x, weights, routing, plan, keep=True)
_Triton().backward(x, x, weights, routing, plan, h, Needs(*[True] * 6))
for bits in (4, 8):
    coding = Coding((bits,) * E, zero_point=bits == 4)
    packed = pack(weights.up, coding), pack(weights.down, coding)
    backend.triton(x, QuantisedWeights(*packed, weights.up_bias, weights.down_bias, "swiglu", DTYPE), routing)
print(json.dumps(found))
