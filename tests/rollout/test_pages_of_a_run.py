"""What ``browse`` has read lies in the run directory: a resumed run reads the same text."""

from __future__ import annotations

import json
from pathlib import Path

from aiohttp import web
from chat_tokenizers import chatml

from system.config.load import load
from system.http import Keys
from system.rollout.context import build_context
from system.serving import serve
from system.tools.outcome import CallContext

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


async def test_a_worker_s_pages_outlive_it(tmp_path: Path) -> None:
    asked: list[str] = []

    async def page(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(text=f"<p>read {len(asked)} times", content_type="text/html")

    app = web.Application()
    app.router.add_get("/page", page)
    server = await serve(app)
    model, run = tmp_path / "model", tmp_path / "run"
    chatml().save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 1000}))
    config = load(QUICKSTART, ["tools.names=[browse]", f"tools.browse_allow=[{server.url}/]"])
    texts: list[str] = []
    for _ in range(2):
        context, tools, engine = build_context(config, str(model), ["http://127.0.0.1:9"], {}, Keys(), run)
        outcome = await tools.call("browse", {"url": f"{server.url}/page"}, CallContext())
        texts.append(outcome.text)
        await tools.close()
        await context.scoring.close()
        await engine.close()
    await server.close()
    assert "read 1 times" in texts[0]
    assert texts[0] == texts[1]
    assert asked == ["/page"]
    assert [path.suffix for path in (run / "pages").iterdir()] == [".page"]
