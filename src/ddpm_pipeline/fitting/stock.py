"""diffusers' deterministic solvers at their documented options: what a fitted sampler has to come nearer than."""

from diffusers import DDIMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

CLIPPED = {"lambda_min_clipped": -5.1}  # where diffusers would have the cosine schedule begin
STOCK = {
    "DDIM": (DDIMScheduler, {}),
    "DDIM, trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "DPM-Solver++, trailing": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "DPM-Solver++, linspace, clipped": (DPMSolverMultistepScheduler, {"timestep_spacing": "linspace", **CLIPPED}),
    "DPM-Solver++, Karras sigmas": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "DPM-Solver++, uniform log-SNR, clipped": (DPMSolverMultistepScheduler, {"use_lu_lambdas": True, **CLIPPED}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "UniPC, trailing": (UniPCMultistepScheduler, {"timestep_spacing": "trailing"}),
    "DEIS": (DEISMultistepScheduler, {}),
}
