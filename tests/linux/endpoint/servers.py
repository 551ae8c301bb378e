"""Servers that people use, each at a port of its own. When all of them listen, there is the file /run/up."""

import asyncio
import functools
import http.server
import os
import subprocess
import threading
from concurrent import futures

import grpc
import websockets


class Lengths(http.server.BaseHTTPRequestHandler):
    """Says how long a body is. Its connections are kept."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        length = len(self.rfile.read(int(self.headers["content-length"])))
        text = f"{length}\n".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


class Echo(grpc.GenericRpcHandler):
    """A service whose messages are bytes."""

    def service(self, call):
        return {
            "/test.Echo/Once": grpc.unary_unary_rpc_method_handler(self.once),
            "/test.Echo/Each": grpc.stream_stream_rpc_method_handler(lambda messages, _: messages),
            "/test.Echo/Refuse": grpc.unary_unary_rpc_method_handler(self.refuse),
        }.get(call.method)

    def once(self, message, context):
        context.set_trailing_metadata((("x-length", str(len(message))),))
        return message

    def refuse(self, message, context):
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "not for you")


def serve(port, handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


async def echo(socket):
    async for message in socket:
        await socket.send(message)


async def main():
    # nginx at port 80, and at 81 by HTTP/2 alone.
    with open("/etc/nginx/conf.d/h2.conf", "w") as file:
        file.write("server { listen 81 http2; root /usr/share/nginx/html; }")
    nginx = subprocess.Popen(["nginx", "-g", "daemon off;"])
    # As `python3 -m http.server` does it.
    serve(8000, functools.partial(http.server.SimpleHTTPRequestHandler, directory="/srv"))
    serve(8001, Lengths)
    service = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Echo()])
    service.add_insecure_port("127.0.0.1:50051")
    service.start()
    async with websockets.serve(echo, "127.0.0.1", 8765, max_size=None):
        while not listens(80):
            await asyncio.sleep(0.05)
        open("/run/up", "w").close()
        await asyncio.to_thread(nginx.wait)


def listens(port):
    """Whether a server has the port: a line of the kernel's table with the state LISTEN."""
    with open("/proc/net/tcp") as table:
        return any(f":{port:04X} 00000000:0000 0A " in line for line in table)


asyncio.run(main())
