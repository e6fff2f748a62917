"""What gunicorn serves: `gunicorn --threads 64 wsgi:app`, from the project's root."""

from server.app import create_app
from server.config import Config

app = create_app(Config.from_env())
