"""An S3 server on loopback (moto's) that can fail on demand."""

import threading
from xml.sax.saxutils import escape

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "stores"
WORDS = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


class Quiet(WSGIRequestHandler):
    """Logs no requests."""

    def log(self, *_):
        pass


class S3Server:
    """Serves S3 from memory; the next requests meet the `faults`, one each, in order.

    A fault is a status, "drop" (close the connection without an answer), "hang" (no answer while
    the client waits), "cut" (close in the middle of the answer), or None. `requests` has the method
    and path of each request, `asked_first` the number of requests with an Expect header.
    """

    def __init__(self):
        self.faults, self.requests = [], []
        self.asked_first = 0
        self.always = None
        self._ended = threading.Event()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def __call__(self, environ, start_response):
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        self.asked_first += "HTTP_EXPECT" in environ
        fault = self.faults.pop(0) if self.faults else self.always
        if fault is None:
            return self._moto(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fault == "hang":
            self._ended.wait(30)
        if fault in ("hang", "drop"):
            return self._closed(environ, start_response)
        if fault == "cut":
            return self._cut(environ, start_response)
        code = WORDS[fault]
        body = f"<Error><Code>{code}</Code><Message>{escape(code)}</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(f"{fault} {code}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def objects(self):
        """Return the keys of all objects."""
        listed = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return [each["Key"] for each in listed]

    def stop(self):
        """Stop the server and release hanging requests."""
        self._ended.set()
        self._server.shutdown()

    def _closed(self, environ, start_response):
        environ["werkzeug.socket"].shutdown(2)
        start_response("200 OK", [])
        return []

    def _cut(self, environ, start_response):
        body = b"".join(self._moto(environ, start_response))

        def half():
            yield body[: len(body) // 2]
            environ["werkzeug.socket"].shutdown(2)

        return half()
