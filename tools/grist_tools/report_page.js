// Says in words what is under the pointer or the finger; browsers show the same title by themselves, but only to a mouse.
function tell(event) {
  const band = event.target.closest("rect.band");
  if (band) band.closest("figure").querySelector("output").textContent = band.querySelector("title").textContent;
}
document.addEventListener("pointerover", tell);
document.addEventListener("pointerdown", tell);
