"""One function per operator serves both of its overloads: ".tensor" differs in the order of its arguments alone."""

from __future__ import annotations


def by_name(value_loss, value_loss_backward, gae, gae_backward):
    """Functions with the default overloads' signatures, under the name of every overload."""

    def value_loss_tensor(
        values, old_values, returns, mask=None, cu_seqlens=None,
        clip_low=None, clip_high=None, batch_num_tokens=None, global_batch_size=None, loss_clamp=None, **options,
    ):  # fmt: skip
        numbers = {
            "clip_low": clip_low,
            "clip_high": clip_high,
            "batch_num_tokens": batch_num_tokens,
            "global_batch_size": global_batch_size,
            "loss_clamp": loss_clamp,
        }
        return value_loss(values, old_values, returns, mask, cu_seqlens, **numbers, **options)

    def gae_tensor(
        rewards, values, gamma, lam, mask=None, terminated=None, truncated=None, next_values=None, bootstrap_values=None,
        cu_seqlens=None, returns_lam=None, **options,
    ):  # fmt: skip
        tensors = (mask, terminated, truncated, next_values, bootstrap_values, cu_seqlens)
        return gae(rewards, values, *tensors, gamma=gamma, lam=lam, returns_lam=returns_lam, **options)

    return {
        "value_loss": value_loss,
        "value_loss.tensor": value_loss_tensor,
        "value_loss_backward": value_loss_backward,
        "gae": gae,
        "gae.tensor": gae_tensor,
        "gae_backward": gae_backward,
    }


def scans_by_name(reverse_scan, reverse_scan_backward, vtrace):
    def reverse_scan_tensor(x, decay, init=None, cu_seqlens=None, **options):
        return reverse_scan(x, init, cu_seqlens, decay=decay, **options)

    def vtrace_tensor(rewards, values, gamma, lam, rho_clip, c_clip, pg_rho_clip, *tensors, **options):
        numbers = {"gamma": gamma, "lam": lam, "rho_clip": rho_clip, "c_clip": c_clip, "pg_rho_clip": pg_rho_clip}
        return vtrace(rewards, values, *tensors, **numbers, **options)

    return {
        "reverse_scan": reverse_scan,
        "reverse_scan.tensor": reverse_scan_tensor,
        "reverse_scan_backward": reverse_scan_backward,
        "vtrace": vtrace,
        "vtrace.tensor": vtrace_tensor,
    }
