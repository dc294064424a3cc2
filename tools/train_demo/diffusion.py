"""The denoiser and its text encoder: networks, training and sampling.

Both are trained together from scratch, with v-prediction on Stable Diffusion's own noise
schedule, first on 16 x 16 latents (128 x 128 pictures), then on 32 x 32.  On a GPU one whole
step (draw a batch, forward, backward, clip, AdamW, average) is compiled and captured in a CUDA
graph, because the networks are so small that launching kernels would cost more than running them.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from . import captions, tokenizer
from . import vae as autoencoder
from .session import Average, OutOfTime, Pacer

WIDTH = 128  # of the text encoder, and of the cross attention
CHANNELS = (64, 96, 128)
STAGES = {"unet128": 128, "unet256": 256}
PEAK_RATE, FLOOR = 1e-3, 0.005
WARM_UP = 500
MOST_NOISE = 0.15  # posterior noise added to latents of deviation 1
UNNAMED = 0.10  # share of captions left empty, for guidance
RESTARTS = (500, 2000)  # steps at which the average starts again from the weights


def build_unet():
    """UNet2DConditionModel, 5.6 M parameters: 32 x 32, 16 x 16 and 8 x 8, attention on the two
    coarser levels, where it is cheap and where the layout of a picture is decided."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=WIDTH,
        attention_head_dim=[2, 3, 4],  # diffusers' name for the number of heads, of 32 each
    )


def build_text(words):
    """CLIPTextModel over the tokenizer's vocabulary, 0.6 M parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.LENGTH,
            projection_dim=WIDTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def build_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


class Denoise(nn.Module):
    """Noisy latents, time and token ids to the predicted v.

    The encoder's layers are called one by one, for the mask code of transformers reads values
    back from the GPU, which a graph cannot record; the result is the same.
    """

    def __init__(self, unet, text):
        super().__init__()
        self.unet, self.text = unet, text

    def encode(self, ids):
        model = getattr(self.text, "text_model", self.text)
        table = model.embeddings
        h = table.token_embedding(ids) + table.position_embedding.weight[: ids.shape[1]]
        for layer in model.encoder.layers:
            attention, x = layer.self_attn, layer.layer_norm1(h)
            parts = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
            q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in parts)
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + attention.out_proj(x.transpose(1, 2).flatten(2))
            x = layer.mlp.fc1(layer.layer_norm2(h))
            h = h + layer.mlp.fc2(x * torch.sigmoid(1.702 * x))
        return model.final_layer_norm(h)

    def forward(self, x, t, ids):
        return self.unet(x, t, self.encode(ids), return_dict=False)[0]


def latents(session):
    """Both sizes' latents and the captions' token ids, computed once and kept on disk.

    {"128": [2N, 4, 16, 16], "256": [2N, 4, 32, 32] (means, scaled; the second half mirrored),
    "spread128", "spread256": [4], "ids": [N, captions, 77] int16}
    """
    kept = session.load("latents.pt")
    if kept:
        return kept
    scenes, _, pictures = session.pictures("training")
    vae = autoencoder.build().to(session.device).eval()
    vae.load_state_dict(session.load("vae.pt"))
    vae.to(memory_format=torch.channels_last)
    kept = {}
    for size in STAGES.values():
        halves = [
            autoencoder.encode(session, vae, pictures, size, mirrored) for mirrored in (False, True)
        ]
        kept[str(size)] = torch.cat([means for means, _ in halves]) * autoencoder.SCALE
        kept[f"spread{size}"] = halves[0][1] * autoencoder.SCALE
    texts = captions.captions(scenes, session.plan.captions_each, seed=5)
    ids = tokenizer.encode(session.tokenizer, [text for each in texts for text in each])
    kept["ids"] = ids.view(len(texts), -1, tokenizer.LENGTH).to(session.device)
    longest = int((ids != session.tokenizer.pad_token_id).sum(1).max()) + 1
    session.log(f"latents of {len(pictures)} pictures; longest caption {longest} tokens")
    session.save("latents.pt", kept)
    session.forget_pictures()
    return kept


class Trainer:
    """The networks, their optimizer and one training step."""

    def __init__(self, session):
        self.session, self.plan, device = session, session.plan, session.device
        self.unet = build_unet().to(device).train()
        self.text = build_text(session.tokenizer).to(device).train()
        if session.gpu:
            self.unet.to(memory_format=torch.channels_last)
        self.networks = nn.ModuleList([self.unet, self.text])
        self.parameters = list(self.networks.parameters())
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim <= 1]
        self.rate = torch.tensor(PEAK_RATE, device=device)  # read by the captured step
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.01},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.rate,
            betas=(0.9, 0.98),
            capturable=session.gpu,
            fused=session.gpu,
        )
        self.average = Average(self.parameters, 0.9995)
        self.model = session.compile(Denoise(self.unet, self.text))
        alphas = build_scheduler().alphas_cumprod.to(device).float()
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.loss = torch.zeros((), device=device)  # summed since last read
        empty = tokenizer.encode(session.tokenizer, [""])
        self.empty = empty.to(device).long()

    def state(self):
        return {
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
        }

    def restore(self, state):
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.copy_(state["average"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def spare(self):
        """The networks as they stand, in fp16: 13 MB that are enough to go on elsewhere."""
        return {key: value.half() for key, value in self.networks.state_dict().items()}

    def restore_spare(self, state):
        """Go on from a spare copy, with a fresh optimizer."""
        self.networks.load_state_dict(state["networks"])
        self.average.copy_(self.parameters)

    def use(self, data, size):
        """Train on this size's latents from now on."""
        self.means, spread = data[str(size)], data[f"spread{size}"].clone()
        # The KL term may leave a channel unused: all posterior noise, and ignored by the decoder.
        # Its latents count as 0, so that the denoiser wastes nothing on them.  One that is used
        # a little is learnt from its means: noise that nobody can predict hides the rest.
        unused = spread > 1
        self.means[:, unused] = 0
        spread[unused] = 0
        self.spread = spread.clamp(max=MOST_NOISE).view(1, 4, 1, 1)
        if not self.means.isfinite().all():
            raise FloatingPointError(f"latents at {size} are not finite")
        self.session.log(f"latents at {size}: noise", [round(v, 3) for v in spread.tolist()])
        self.ids = data["ids"]

    def step(self):
        """One update on a random batch; nothing in it waits for the GPU."""
        batch, device = self.plan.unet_batch, self.session.device
        i = torch.randint(0, len(self.means), (batch,), device=device)
        z = self.means[i].float()
        z = z + self.spread * torch.randn_like(z)
        which = torch.randint(0, self.ids.shape[1], (batch,), device=device)
        ids = self.ids[i % len(self.ids), which].long()  # a mirrored picture has the same captions
        unnamed = torch.rand(batch, 1, device=device) < UNNAMED
        ids = torch.where(unnamed, self.empty, ids)
        t = torch.randint(0, 1000, (batch,), device=device)
        noise = torch.randn_like(z)
        a, s = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        with self.session.autocast():
            v = self.model(a * z + s * noise, t, ids)
        loss = F.mse_loss(v.float(), a * noise - s * z)
        loss.backward()
        for p in self.parameters:  # one bad batch must not end a run that nobody watches
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.average.update()
        self.loss.add_(loss.detach())

    def captured(self):
        """The step as a CUDA graph; the plain step where capture is not to be had."""
        if not self.session.gpu:
            return self.step
        start = time.monotonic()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.session.log(f"unet: compiled and captured in {time.monotonic() - start:.0f} s")
        return graph.replay


def _rate(progress, step):
    """Warm-up, then a cosine over both sizes' stages together."""
    curve = FLOOR + (1 - FLOOR) * (0.5 + 0.5 * math.cos(math.pi * progress))
    return PEAK_RATE * min(1, (step + 1) / WARM_UP) * curve


def _resume(session, trainer, stage):
    """Load what was saved furthest; returns this stage's {"spent": seconds, "step": steps}."""
    state, spare = session.load("unet-training.pt"), session.load("spare.pt")
    nothing = {"stage": stage, "spent": 0.0, "step": 0}
    spent = state["spent"] if state and state["stage"] == stage else 0.0
    if spare and spare["stage"] == stage and spare["spent"] > spent:
        trainer.restore_spare(spare)
        return spare
    if state:
        trainer.restore(state)
        return state if state["stage"] == stage else nothing
    return nothing


def train(session, stage, watch):
    """Run "unet128" or "unet256"; leaves generator.pt (averaged weights).

    watch(trainer, pacer) is called every watch_seconds of training, for samples and spare copies.
    """
    data = latents(session)
    trainer = Trainer(session)
    trainer.use(data, STAGES[stage])
    trainer.rate.fill_(_rate(0.0, 0))
    mine = _resume(session, trainer, stage)
    pacer = Pacer(session.plan, stage, session.deadline, mine["spent"], mine["step"])
    whole = sum(session.plan.seconds[name] for name in STAGES)
    before = session.plan.seconds["unet128"] if stage == "unet256" else 0.0
    run = trainer.captured()
    trainer.loss.zero_()
    next_look = pacer.spent + session.plan.watch_seconds
    first = pacer.step
    while pacer.running():
        share = session.plan.seconds[stage]
        progress = (before + share * pacer.fraction()) / whole
        # Warm up in every call: AdamW's averages are new, or of the other size's gradients.
        trainer.rate.fill_(_rate(progress, pacer.step - first))
        run()
        pacer.step += 1
        if pacer.step in RESTARTS:
            trainer.average.copy_(trainer.parameters)
        if pacer.step % 1000 == 0:
            loss = trainer.loss.item() / 1000
            session.log(f"{stage} step {pacer.step} loss {loss:.4f}")
            if not math.isfinite(loss):
                raise FloatingPointError(f"{stage}: the loss is {loss}")
            trainer.loss.zero_()
        elif pacer.step % 20 == 0:
            session.synchronize()
        if pacer.spent > next_look:
            next_look = pacer.spent + session.plan.watch_seconds
            session.synchronize()
            with pacer.paused(), trainer.average.swapped():
                place = {"stage": stage, "spent": pacer.spent, "step": pacer.step}
                session.save("spare.pt", {"networks": trainer.spare(), **place})
                watch(trainer, pacer)
    session.save(
        "unet-training.pt",
        {**trainer.state(), "stage": stage, "spent": pacer.spent, "step": pacer.step},
    )
    with trainer.average.swapped():
        save_generator(session, trainer, "generator.pt")
    try:
        session.end_of_stage(stage, pacer)
    except OutOfTime:
        session.log("loss of the last steps", trainer.loss.item())
        raise


def save_generator(session, trainer, name):
    """UNet and text encoder, as they stand in the networks."""
    session.save(name, {"unet": trainer.unet.state_dict(), "text": trainer.text.state_dict()})


@torch.no_grad()
def sample(session, unet, text, prompts, seeds, size=256, steps=20, guidance=3.0):
    """Latents (scaled) for prompts by DDIM: [len(prompts), 4, size/8, size/8].

    The first noise of seed s is torch.Generator().manual_seed(s)'s on the CPU, so that a pipeline
    anywhere else starts from the same.
    """
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps, device=session.device)
    encode = Denoise(unet, text).encode
    ids = tokenizer.encode(session.tokenizer, [*prompts, ""]).to(session.device).long()
    named = encode(ids)
    unnamed = named[-1:].expand(len(prompts), -1, -1)
    context = torch.cat([unnamed, named[:-1]])
    shape = (1, 4, size // 8, size // 8)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    x = torch.cat(noise).to(session.device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        v = unet(torch.cat([x, x]), t, context, return_dict=False)[0]
        without, with_prompt = v.chunk(2)
        v = without + guidance * (with_prompt - without)
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return x
