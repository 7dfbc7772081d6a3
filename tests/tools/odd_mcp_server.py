"""An MCP server over stdio that offers what its first argument says (JSON: the tools of ``tools/list``), and
answers each call with a structured content that repeats the arguments.
"""

from __future__ import annotations

import json
import sys

tools = json.loads(sys.argv[1])
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    answer: dict[str, object] = {}
    match asked["method"]:
        case "initialize":
            version = asked["params"]["protocolVersion"]
            about = {"name": "odd", "version": "1"}
            answer = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
        case "tools/list":
            answer = {"tools": tools}
        case "tools/call":
            arguments = asked["params"]["arguments"]
            text = {"type": "text", "text": json.dumps(arguments)}
            answer = {"content": [text], "structuredContent": arguments}
        case "ping":
            pass
        case method:
            error = {"code": -32601, "message": f"no {method}"}
            print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": error}), flush=True)
            continue
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": answer}), flush=True)
