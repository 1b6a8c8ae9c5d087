import os

if os.environ.get("FAKECUDA") and os.environ.get("FAKECUDA_ATEN", "1") != "0":
    from fakecuda.aten import hook

    hook()
