"""diffusers' deterministic solvers at their documented options: what a fitted sampler has to come nearer than."""

CLIPPED = {"lambda_min_clipped": -5.1}  # where diffusers would have the cosine schedule begin
DPM = "DPMSolverMultistepScheduler"
STOCK = {  # classes, by name since their modules import scipy, and options
    "DDIM": ("DDIMScheduler", {}),
    "DDIM, trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "DPM-Solver++": (DPM, {}),
    "DPM-Solver++, trailing": (DPM, {"timestep_spacing": "trailing"}),
    "DPM-Solver++, linspace, clipped": (DPM, {"timestep_spacing": "linspace", **CLIPPED}),
    "DPM-Solver++, Karras sigmas": (DPM, {"use_karras_sigmas": True}),
    "DPM-Solver++, uniform log-SNR, clipped": (DPM, {"use_lu_lambdas": True, **CLIPPED}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC, trailing": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "DEIS": ("DEISMultistepScheduler", {}),
}
