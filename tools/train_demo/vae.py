"""The autoencoder: AutoencoderKL with 4 latent channels at an eighth of the picture's size.

It learns on 128 x 128 windows first, then on whole pictures, with a patch discriminator for
crisp edges; `fold_scale` then gives the latents mean 0 and the standard deviation that the
usual scaling factor expects.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import judge as judges
from .session import Average, Pacer, to_float

CHANNELS = (32, 48, 64, 64)
SCALE = 0.18215
KL_WEIGHT = 4e-3  # per latent element; keeps the posterior's noise a few percent of the signal
GAN_FROM = {"vae128": 2.0, "vae256": 0.2}  # fraction of the stage
PEAK_RATE = {"vae128": 8e-4, "vae256": 5e-4}


def build():
    """The autoencoder with fresh weights, 1.13 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=SCALE,
    )


class Reconstruct(nn.Module):
    """Pictures and noise to reconstruction, mean and log variance."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x, noise):
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(x)).float().chunk(2, 1)
        log_variance = log_variance.clamp(-20, 10)
        z = mean + noise * torch.exp(0.5 * log_variance)
        return self.vae.decoder(self.vae.post_quant_conv(z)), mean, log_variance


class Distance(nn.Module):
    """L1, edges at three scales, and the judge's first layers as a perceptual distance."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge

    def forward(self, a, b):
        loss = (a.float() - b.float()).abs().mean()
        for p, q in zip(self.judge.features(a, 4), self.judge.features(b, 4)):
            p, q = p.float(), q.float()
            p = p / (p.pow(2).mean(1, True) + 1e-3).sqrt()
            q = q / (q.pow(2).mean(1, True) + 1e-3).sqrt()
            loss = loss + 0.12 * (p - q).pow(2).mean()
        difference = a.float() - b.float()
        for _ in range(3):
            across = (difference[..., 1:] - difference[..., :-1]).abs().mean()
            down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
            loss = loss + 0.5 * (across + down)
            difference = F.avg_pool2d(difference, 2)
        return loss


class Discriminator(nn.Module):
    """Real or reconstructed, for each patch; also returns its inner layers."""

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out in ((3, 48), (48, 96), (96, 160)):
            norm = nn.GroupNorm(8, c_out) if c_in > 3 else nn.Identity()
            layers.append(nn.Sequential(nn.Conv2d(c_in, c_out, 4, 2, 1), norm, nn.LeakyReLU(0.2)))
        self.layers = nn.ModuleList(layers)
        self.verdict = nn.Conv2d(160, 1, 3, 1, 1)

    def forward(self, x):
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.verdict(x), features


def _windows(pictures, count):
    """count 128 x 128 pictures: half are windows cut out, half whole pictures made smaller."""
    i = torch.randint(0, len(pictures), (count,), device=pictures.device)
    x = to_float(pictures[i])
    left, top = torch.randint(0, 129, (2,)).tolist()
    cut = x[: count // 2, :, top : top + 128, left : left + 128]
    return torch.cat([cut, F.avg_pool2d(x[count // 2 :], 2)])


class Trainer:
    """State and one step of a stage of the autoencoder's training."""

    def __init__(self, session, stage, vae, judge):
        self.session, self.stage, self.vae = session, stage, vae
        vae.to(session.device).to(memory_format=torch.channels_last).train()
        self.parameters = list(vae.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, 1e-3, betas=(0.9, 0.98), weight_decay=1e-3, fused=session.gpu
        )
        self.critic = Discriminator().to(session.device).to(memory_format=torch.channels_last)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), 4e-4, betas=(0.5, 0.9), weight_decay=1e-3, fused=session.gpu
        )
        self.average = Average(self.parameters, 0.999)
        self.model = session.compile(Reconstruct(vae))
        self.distance = session.compile(Distance(judge))
        self.size = 128 if stage == "vae128" else 256
        self.batch = max(1, session.plan.vae_batch // (1 if self.size == 128 else 4))

    def state(self):
        return {
            "vae": self.vae.state_dict(),
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "critic": self.critic.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }

    def restore(self, state, whole):
        """Take up a saved state; whole also takes the optimizer (the same stage goes on)."""
        self.critic.load_state_dict(state["critic"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if whole:
            self.vae.load_state_dict(state["vae"])
            self.average.copy_(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])

    def _pictures(self, pictures):
        if self.size == 128:
            x = _windows(pictures, self.batch)
        else:
            i = torch.randint(0, len(pictures), (self.batch,), device=pictures.device)
            x = to_float(pictures[i])
        if torch.rand(()) < 0.5:
            x = x.flip(3)
        return x.contiguous(memory_format=torch.channels_last)

    def _reconstruct(self, x):
        """Reconstruction and the KL term."""
        noise = torch.randn(len(x), 4, self.size // 8, self.size // 8, device=x.device)
        made, mean, log_variance = self.model(x, noise)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return made, KL_WEIGHT * kl

    def _flatter(self, made, x):
        """What the critic adds to the loss: its verdict, and its layers' distance."""
        self.critic.requires_grad_(False)
        verdict, features = self.critic(made)
        with torch.no_grad():
            _, wanted = self.critic(x)
        self.critic.requires_grad_(True)
        pairs = zip(features, wanted)
        match = sum((p.float() - q.float()).abs().mean() for p, q in pairs)
        return 0.06 * match - 0.02 * verdict.float().mean()

    def step(self, pictures, fraction, count):
        """One update; returns the loss."""
        rate = PEAK_RATE[self.stage] * min(1, (count + 1) / 200)
        rate *= 0.515 + 0.485 * math.cos(math.pi * fraction)
        self.optimizer.param_groups[0]["lr"] = rate
        since = fraction - GAN_FROM[self.stage]
        x = self._pictures(pictures)
        with self.session.autocast():
            made, kl = self._reconstruct(x)
            loss = self.distance(made, x) + kl
            if since >= 0:
                loss = loss + min(1, since / 0.08 + 0.02) * self._flatter(made, x)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.update(min(0.999, (count + 1) / (count + 20)))
        if since >= 0:
            with self.session.autocast():
                real, _ = self.critic(x)
                false, _ = self.critic(made.detach())
            verdict = F.relu(1 - real.float()).mean() + F.relu(1 + false.float()).mean()
            self.critic_optimizer.zero_grad()
            verdict.backward()
            self.critic_optimizer.step()
        return loss.detach()


def train(session, stage):
    """Run "vae128" or "vae256"; leaves vae.pt with the averaged weights."""
    judge = judges.load(session)
    _, _, pictures = session.pictures("training")
    vae = build()
    if session.load("vae.pt"):
        vae.load_state_dict(session.load("vae.pt"))
    trainer = Trainer(session, stage, vae, judge)
    saved = session.load("vae-training.pt")
    state = {"spent": 0.0, "step": 0}
    if saved:
        trainer.restore(saved, whole=saved["stage"] == stage)
        state = saved if saved["stage"] == stage else state
    session.log(f"{stage}: compiling")
    for _ in range(3 if session.compiled else 0):
        trainer.step(pictures, 0.0, 0)
    session.synchronize()
    session.log(f"{stage}: begins at {state['spent']:.0f} s")
    pacer = Pacer(session.plan, stage, session.deadline, state["spent"], state["step"])
    while pacer.running():
        loss = trainer.step(pictures, pacer.fraction(), pacer.step)
        pacer.step += 1
        if pacer.step % 500 == 0:
            session.log(f"{stage} step {pacer.step} loss {loss.item():.4f}")
        elif pacer.step % 20 == 0:
            session.synchronize()
    session.save(
        "vae-training.pt",
        {**trainer.state(), "stage": stage, "spent": pacer.spent, "step": pacer.step},
    )
    session.end_of_stage(stage, pacer)
    trainer.average.swap()
    vae.eval()
    if stage == "vae256":
        fold_scale(vae, encode(session, vae, pictures[:4000])[0])
    session.save("vae.pt", vae.state_dict())
    report(session, vae, judge, stage)


@torch.no_grad()
def encode(session, vae, pictures, size=256, mirrored=False):
    """Latent means [N, 4, size/8, size/8] (fp16) and the posterior's deviation per channel [4]."""
    means, spreads = [], []
    for some in pictures.split(500):
        x = to_float(some)
        x = F.avg_pool2d(x, 256 // size) if size < 256 else x
        x = (x.flip(3) if mirrored else x).contiguous(memory_format=torch.channels_last)
        with session.autocast():
            posterior = vae.encode(x).latent_dist
        means.append(posterior.mean.half())
        spreads.append(posterior.std.float().mean((0, 2, 3)))
    return torch.cat(means), torch.stack(spreads).mean(0)


@torch.no_grad()
def decode(session, vae, z):
    """Unscaled latents to pictures in -1..1, float."""
    parts = []
    for some in z.split(100):
        with session.autocast():
            parts.append(vae.decode(some.to(session.device).float()).sample)
    return torch.cat([part.float().clamp(-1, 1) for part in parts])


@torch.no_grad()
def fold_scale(vae, means):
    """Give latents mean 0 and deviation 1/SCALE per channel, by the 1 x 1 convolutions."""
    means = means.double()
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))
    gain = 1 / SCALE / deviation
    inner, outer = vae.quant_conv, vae.post_quant_conv
    weight, bias = outer.weight.double(), outer.bias.double()
    outer.bias.copy_(bias + weight[:, :, 0, 0] @ mean)
    outer.weight.copy_(weight / gain.view(1, 4, 1, 1))
    inner.weight[:4] *= gain.view(4, 1, 1, 1).float()
    moved = torch.cat([(inner.bias[:4].double() - mean) * gain, inner.bias[4:] + 2 * gain.log()])
    inner.bias.copy_(moved)


def report(session, vae, judge, stage):
    """PSNR and the judge's reading of reconstructions of unseen pictures."""
    scenes, _, pictures = session.pictures("validation")
    means, spread = encode(session, vae, pictures)
    made = decode(session, vae, means)
    error = ((to_float(pictures) - made) ** 2).mean((1, 2, 3)) / 4
    session.log(f"{stage}: PSNR {(-10 * error.log10()).mean().item():.2f} dB")
    deviation = means.float().std((0, 2, 3))
    session.log(f"{stage}: latents' deviation", [round(v, 3) for v in deviation.tolist()])
    session.log(f"{stage}: posterior's share", [round(v, 4) for v in (spread / deviation).tolist()])
    answer = judges.read(session, judge, made)
    session.log(
        f"{stage}: judge on reconstructions", judges.accuracy(answer, judges.labels(scenes))
    )
    pairs = torch.stack([to_float(pictures[:8]), made[:8]], 1).flatten(0, 1)
    from .evaluate import sheet

    sheet(pairs, 4).save(session.folder / f"reconstructions-{stage}.png")
