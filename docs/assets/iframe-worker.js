// Search runs in a worker, which browsers refuse to pages from the file system. There, an invisible frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inner.importScripts = (...urls) => urls.reduce((before, each) => before.then(() => this.run(frame, each)), Promise.resolve());
      this.run(frame, url).then(() => {
        this.inner = inner;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      });
    }

    run(frame, url) {
      const script = frame.contentDocument.createElement("script");
      script.src = url;
      const done = new Promise((resolve, reject) => Object.assign(script, { onload: resolve, onerror: reject }));
      frame.contentDocument.body.append(script);
      return done;
    }

    postMessage(data) {
      if (this.inner) this.inner.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }

    terminate() {}
  };
}
