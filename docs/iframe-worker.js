/* Search runs in a worker, which browsers refuse to pages that are opened from a disk. There its script runs in a frame,
   with a worker's two ways of passing messages. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.inside = new Promise(resolve => addEventListener("DOMContentLoaded", () => resolve(), { once: true }))
      if (document.readyState !== "loading") this.inside = Promise.resolve()
      this.inside = this.inside.then(() => new Promise(resolve => {
        document.body.append(frame)
        const inside = frame.contentWindow
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = inside.document.createElement("script")
        script.src = new URL(url, location.href)
        script.onload = () => resolve(inside)
        inside.document.body.append(script)
      }))
    }

    postMessage(data) {
      this.inside.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
  }
}
