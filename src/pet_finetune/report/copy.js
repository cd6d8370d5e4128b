/* A button on each block of commands copies it. */
document.querySelectorAll("pre.copy").forEach((block) => {
  const button = document.createElement("button");
  button.type = "button"; button.className = "copy-button"; button.textContent = "copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(block.querySelector("code"));
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  block.append(button);
});
